"""The report of runs on disk, from folders that these tests write in the format of a run."""

import base64
import csv
import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from model.tokenizer import load_tokenizer
from train.report import print_report, write_report
from train.results import read_runs
from train.samples import choose, pieces

PROMPTS = ("Once upon a time", "The")
TEXT = " there was a little fox who lived in the wood.\n\nShe said, “Next time, bring an axe!”"
HOSTILE = "<script>alert(1)</script><b onclick='x'>&amp;</b><iframe src=//example.com>"


def write_run(
    folder: Path,
    lr: float = 1e-4,
    steps: int = 60,
    eval_every: int = 20,
    final_loss: float = 0.05,
    texts: Sequence[str] = (TEXT,),
    **about: Any,
) -> Path:
    """A run whose loss falls exponentially from 7 to `final_loss`; its mass keeps to the bound.

    `texts` are the samples of each prompt, at each evaluation; in proportion to the mass they end
    in repeated " X".
    """
    tokenizer = load_tokenizer()
    members = [i for i in range(tokenizer.n_vocab - 1) if b"x" in tokenizer.token_bytes(i).lower()]
    losses = [7 * (final_loss / 7) ** (s / (steps - 1)) for s in range(steps)]
    metrics: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for done in range(steps + 1):
        mass = min(1.0, math.exp(-losses[min(done, steps - 1)]) * 1.02)
        if done % eval_every == 0 or done == steps:
            measures = {
                "r": mass,
                "r_top_k": mass**2,
                "passage_perplexity": 470 * (1 + mass),
                "sample_perplexity": 80 * math.exp(6 * mass),
            }
            metrics.append({"step": done, "evaluation": measures})
            for prompt in PROMPTS:
                for text in texts:
                    ids = tokenizer.encode(text)
                    kept = round((1 - mass) * len(ids))
                    ids[kept:] = tokenizer.encode(" X" * (len(ids) - kept))
                    samples.append({"step": done, "prompt": prompt, "ids": ids})
        if done < steps:
            loss = losses[done]
            metrics.append({"step": done + 1, "loss": loss, "mass": mass, "seconds": 0.25})
    described = {
        "options": {"model": "tiny", "lr": lr, "steps": steps, "seed": 0},
        "goal": "tokens that contain 'X' in either case",
        "members": len(members),
        "member_ids": members,
        "alpha": 1.0,
        "beta": 0.0,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "triton": "3.7.1"},
        "device": "CPU",
        "dtype": "float32",
    }
    folder.mkdir(parents=True)
    config = {"model_type": "gpt2", "xfactor": described | about}
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


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
    reported = "reported originally, by others"
    assert sources == [
        ("measured", "(before)"),
        ("measured", "1e-6"),
        ("measured", "1e-4"),
        (reported, "1e-6"),
        (reported, "1e-4"),
    ]
    assert float(rows[2]["loss last"]) == pytest.approx(0.001)
    assert rows[4]["loss last"] == "about 0.001"
    assert "claims of others, not measured here" in report[1]


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


def test_runs_of_one_rate_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Same rate in two folders; and a folder given twice counts once."""
    first = write_run(tmp_path / "seed0" / "lr", 1e-4)
    second = write_run(tmp_path / "seed1" / "lr", 1e-4)
    labels = [run.label for run in read_runs([first, second, tmp_path / "seed0"])]
    assert labels == ["1e-4 (seed0)", "1e-4 (seed1)"]


def test_killed_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    """The last line is cut off in the middle, as kill -9 leaves it, at each byte of its last 300.

    A loss that is cut off must not be read as a shorter number.
    """
    run = write_run(tmp_path / "run", steps=4, eval_every=2)
    whole = (run / "metrics.jsonl").read_bytes()
    losses = read_runs([run])[0].losses
    for length in range(len(whole) - 300, len(whole)):
        (run / "metrics.jsonl").write_bytes(whole[:length])
        got = read_runs([run])[0].losses
        assert got == losses[: len(got)]


def test_run_that_has_not_started_is_left_out_of_its_folder(tmp_path: Path) -> None:
    """train.xfactor makes all folders first: the second rate's logs are empty while the first's
    run is interrupted."""
    write_run(tmp_path / "lr-1e-06", 1e-6)
    waiting = write_run(tmp_path / "lr-0.0001", 1e-4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (waiting / name).write_text("")
    assert [run.lr for run in read_runs([tmp_path])] == [1e-6]
    with pytest.raises(ValueError, match="got no step"):
        read_runs([waiting])


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


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("config.json", '{"model_type": "gpt2"}', "'xfactor'"),
        ("config.json", "not JSON", "Expecting value"),
        ("metrics.jsonl", '{"step": 1, "mass": 0.5, "seconds": 1}\n', "line 1: no key 'loss'"),
        ("metrics.jsonl", '{"step": 2, "loss": 1, "mass": 0, "seconds": 1}\n', "got step 2 after"),
        ("metrics.jsonl", "[1]\n", "line 1"),
        ("samples.jsonl", '{"step": 0, "prompt": "The", "ids": []}\n', "got no id"),
        ("samples.jsonl", "", "no samples after"),
        ("samples.jsonl", None, "samples.jsonl"),
    ],
)
def test_spoilt_file_is_named_with_what_was_expected(
    tmp_path: Path, file: str, line: str | None, expected: str
) -> None:
    """One line that names the file, what is wrong with it, and what belongs there."""
    run = write_run(tmp_path / "run", steps=3)
    (run / file).unlink() if line is None else (run / file).write_text(line)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        read_runs([run])
    assert str(run) in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_command_line_ends_in_one_line_for_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """No traceback; exit status 1; the path and what was expected."""
    command = [sys.executable, "-m", "train.report", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: got no run, expected a run of")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
