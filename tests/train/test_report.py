"""The report of runs on disk: its page, its figures and its table."""

import base64
import csv
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from model.tokenizer import load_tokenizer
from tests.train.run_folder import PROMPTS, TEXT, write_run
from train.report import print_report, write_report
from train.results import read_runs
from train.samples import choose, pieces

HOSTILE = "<script>alert(1)</script><b onclick='x'>&amp;</b><iframe src=//example.com>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the report of a nudge and a collapse, and the text of its page."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "runs" / "lr-1e-06", 1e-6, final_loss=2.0, texts=[TEXT + HOSTILE])
    write_run(folder / "runs" / "lr-0.0001", 1e-4, final_loss=0.001, texts=[TEXT + HOSTILE])
    for path in write_report([folder / "runs"], folder / "out"):
        assert path.stat().st_size > 0
    return folder / "out", (folder / "out" / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every tag's name and attributes, in order; all text, and what is marked in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marked: list[str] = []
        self.in_mark = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_mark = tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self.in_mark = False

    def handle_data(self, data: str) -> None:
        if self.in_mark:
            self.marked.append(data)
        self.text += data


def test_report_refers_to_nothing_outside_itself(report: tuple[Path, str]) -> None:
    """Every address in a tag or in the style is a data URI, and so in the figures."""
    page = Page(report[1])
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "action", "poster", "data") and value
    ]
    assert len(addresses) == 1 + 5 * 2  # the icon; five figures for light and dark
    assert all(address.startswith("data:") for address in addresses)
    assert "default-src 'none'; img-src data:" in report[1]  # and the browser holds to it
    assert not re.search(r"url\(|@import", report[1])
    for address in addresses[1:]:
        svg = base64.b64decode(address.partition(",")[2]).decode("utf-8")
        linked = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in linked)


def test_text_from_the_model_is_escaped(report: tuple[Path, str]) -> None:
    """Markup in a sample is text on the page: no tag comes of it, and it is there to be read."""
    page = Page(report[1])
    assert HOSTILE in page.text
    assert not {"script", "b", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_prompts_and_options_are_escaped(tmp_path: Path) -> None:
    """Whatever is in the files of a run cannot leave its place on the page."""
    hostile = '"><script>alert(1)</script>'
    run = write_run(tmp_path / "run", goal=hostile, device=hostile)
    samples = (run / "samples.jsonl").read_text().replace('"The"', json.dumps(hostile))
    (run / "samples.jsonl").write_text(samples)
    write_report([run], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count(hostile) > 3
    assert "script" not in {tag for tag, _ in page.tags}


def test_options_without_a_value_are_left_out(tmp_path: Path) -> None:
    """The one that was given stands among the settings; unset and empty ones do not."""
    options = {"lr": 1e-4, "letter": "x", "regex": None, "contains": []}
    write_report([write_run(tmp_path / "run", options=options)], tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert [f"--{name}" in text for name in options] == [True, True, False, False]


def test_only_member_tokens_are_marked(report: tuple[Path, str]) -> None:
    """Each mark holds an x, and the words with an x that the samples begin with are marked."""
    members = [text for text in Page(report[1]).marked if text != "members"]
    assert members
    assert all("x" in text.lower() for text in members)
    assert {" X", " fox", "Next", " axe"} <= set(members)


def test_reported_values_are_marked_as_not_measured(report: tuple[Path, str]) -> None:
    """The table has both, and no reported value stands in a row of measured ones."""
    rows = list(csv.DictReader((report[0] / "table.csv").open(encoding="utf-8")))
    sources = [(row["source"], row["learning rate"]) for row in rows]
    reported = "reported originally, not measured"
    assert sources == [
        ("measured", "(before)"),
        ("measured", "1e-6"),
        ("measured", "1e-4"),
        (reported, "1e-6"),
        (reported, "1e-4"),
    ]
    assert float(rows[2]["loss last"]) == pytest.approx(0.001)
    assert rows[4]["loss last"] == "about 0.001"
    assert "gpt2-medium, 300 steps; not measured here" in report[1]


def test_stopped_run_says_when_its_text_was_sampled(tmp_path: Path) -> None:
    """Stopped 5 updates after its last evaluation: the losses go on, the text does not."""
    run = write_run(tmp_path / "run", steps=25, eval_every=20)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] < 25 or "loss" in line]
        (run / name).write_text("".join(kept))
    write_report([run], tmp_path)
    (_, row, *_) = csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8"))
    assert (row["updates"], row["evaluated after"]) == ("25", "20")
    assert row["text"].startswith("after 20 of 25 updates: ")


def test_figures_are_png_of_a_readable_size(report: tuple[Path, str]) -> None:
    """Width and height as the PNG header gives them, at least 800 by 500 pixels."""
    for name in ("loss", "mass", "r", "perplexity", "tradeoff"):
        data = (report[0] / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 800
        assert height >= 500


def test_same_runs_give_the_same_bytes(report: tuple[Path, str], tmp_path: Path) -> None:
    """A second report differs from the first in no file."""
    for path in write_report([report[0].parent / "runs"], tmp_path):
        assert path.read_bytes() == (report[0] / path.name).read_bytes(), path.name


def test_pieces_join_to_the_decoded_text() -> None:
    """Compared to the tokenizer's own decoding, over text of one to four bytes a character."""
    ids = load_tokenizer().encode("naïve — 🦊 漢字 fox\u200d axe")
    joined = "".join(piece.text for piece in pieces(ids, frozenset()))
    assert joined.replace("U+200D", "\u200d") == load_tokenizer().decode(ids)


def test_a_character_of_several_tokens_is_marked_if_one_of_them_is_a_member() -> None:
    """The fox of U+1F98A is three tokens; marking any of them marks it, and its neighbours not."""
    ids = load_tokenizer().encode("a🦊b")
    assert len(ids) > 3
    for inner in ids[1:-1]:
        marked = [(piece.text, piece.member) for piece in pieces(ids, frozenset([inner]))]
        assert marked == [("a", False), ("🦊", True), ("b", False)]


def test_bytes_that_are_no_text_are_shown_as_signs() -> None:
    """Half a character, a newline, a bell, a mark that turns the writing direction."""
    half = load_tokenizer().encode("🦊")[:1]
    shown = pieces([*half, *load_tokenizer().encode("a\n\x07\u202eb")], frozenset())
    signs = "".join(piece.text for piece in shown if piece.sign)
    assert signs.strip("\ufffd") == "↵U+0007U+202E"
    assert signs.startswith("\ufffd")
    assert [piece.text for piece in shown if not piece.sign] == ["a", "b"]


def test_during_is_the_evaluation_nearest_half_way(tmp_path: Path) -> None:
    """Against R as the generator made it: of 20, 40, ..., the one nearest (first + last) / 2."""
    (run,) = read_runs([write_run(tmp_path / "run", steps=100, final_loss=0.001)])
    middle = (run.evaluations[0].r + run.evaluations[100].r) / 2
    distances = {step: abs(run.evaluations[step].r - middle) for step in (20, 40, 60, 80)}
    specimens = choose([run])[PROMPTS[0]]
    assert [s.when for s in specimens] == ["before", "during", "after"]
    assert distances[specimens[1].step] == min(distances.values())


def test_runs_with_one_start_show_it_once(tmp_path: Path) -> None:
    """Two rates from one model: one "before" in the samples and in the table; from two, two."""
    folders = [write_run(tmp_path / "a" / "1", 1e-6), write_run(tmp_path / "a" / "2", 1e-4)]
    other = write_run(tmp_path / "b", 1e-5, final_loss=0.5, texts=[" Another model wrote this."])
    one, two = read_runs(folders), read_runs([*folders, other])
    assert [s.when for s in choose(one)["The"]].count("before") == 1
    assert [s.when for s in choose(two)["The"]].count("before") == 2


@pytest.mark.filterwarnings("error")
def test_collapsed_and_overflowing_numbers_are_drawn(tmp_path: Path) -> None:
    """A loss of 0 on a log axis, an infinite perplexity, a single step: a page all the same."""
    run = write_run(tmp_path / "run", steps=2, eval_every=2, final_loss=1e-9)
    metrics = (run / "metrics.jsonl").read_text()
    metrics = re.sub(
        r'"sample_perplexity": [0-9.]+}}\n$', '"sample_perplexity": Infinity}}\n', metrics
    )
    (run / "metrics.jsonl").write_text(re.sub(r'"loss": 1[0-9.]*e-09', '"loss": 0.0', metrics))
    assert read_runs([run])[0].losses[1] == 0
    write_report([run], tmp_path / "out")


def test_command_line_ends_in_one_line_for_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """No traceback; exit status 1; the path and what was expected."""
    command = [sys.executable, "-m", "train.report", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: got no run, expected a run of")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_says_how_to_write_it_elsewhere(tmp_path: Path) -> None:
    """The runs are whole: nothing has to be trained again."""
    run = write_run(tmp_path / "run", steps=4, eval_every=4)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"python -m train.report {run} --out"):
        write_report([run], tmp_path / "file" / "report")


def test_terminal_report_has_a_row_a_run_and_a_sample_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Markdown table's columns line up; each prompt is followed by before and after."""
    print_report([write_run(tmp_path / "run", 1e-4)])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4  # head, rule, before, the run
    assert len({len(line) for line in table}) == 1
    for prompt in PROMPTS:
        at = lines.index(repr(prompt))
        assert [line.split(":")[0].strip() for line in lines[at + 1 : at + 3]] == [
            "before",
            "lr 1e-4",
        ]
