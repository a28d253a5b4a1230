"""The report of runs on disk: its page, its figures, its table and what it prints."""

import base64
import csv
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from model.tokenizer import load_tokenizer
from tests.train.run_folder import PROMPTS, TEXT, write_run
from train import console
from train.checkpoint import replacing
from train.report import figures, summary, write_report
from train.report.__main__ import report as report_command
from train.report.runs import read_runs
from train.report.samples import moments, opening, pieces, typical

HOSTILE = "<script>alert(1)</script><b onclick='x'>&amp;</b><iframe src=//example.com>"
PNGS = ("tradeoff", "tradeoff-dark", "curves", "evaluations")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the report of a nudge, a collapse and a dial, and the text of its page."""
    folder = tmp_path_factory.mktemp("report")
    runs, texts = folder / "runs", [TEXT + HOSTILE]
    write_run(runs / "1-nudge", 1e-6, final_loss=2.0, texts=texts)
    write_run(runs / "2-collapse", 1e-4, final_loss=0.001, texts=texts)
    write_run(runs / "3-dial", 1e-3, 5.0, predicted=0.22, texts=texts)
    for path in write_report([runs], folder / "out"):
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
    assert "default-src 'none'; img-src data:" in report[1]  # and the browser enforces it
    assert not re.search(r"url\(|@import", report[1])
    for address in addresses[1:]:
        svg = base64.b64decode(address.partition(",")[2]).decode("utf-8")
        linked = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in linked)


def test_text_from_the_model_is_escaped(report: tuple[Path, str]) -> None:
    """Markup in a sample is text on the page: it is there to be read, and makes no tag."""
    page = Page(report[1])
    assert HOSTILE in page.text
    assert not {"script", "b", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_prompts_and_options_are_escaped(tmp_path: Path) -> None:
    """Nothing in a run's files can leave its place on the page."""
    hostile = '"><script>alert(1)</script>'
    run = write_run(tmp_path / "run", goal=hostile, device=hostile)
    samples = (run / "samples.jsonl").read_text().replace('"The"', json.dumps(hostile))
    (run / "samples.jsonl").write_text(samples)
    write_report([run], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count(hostile) > 3
    assert "script" not in {tag for tag, _ in page.tags}


def test_options_without_a_value_are_left_out(tmp_path: Path) -> None:
    """An option that was given is among the settings; unset and empty ones are not."""
    options = {"lr": [1e-4], "letter": "Q", "regex": "", "mass": None, "contains": []}
    write_report([write_run(tmp_path / "run", options=options)], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    settings = re.findall(r'<th scope="row" class="name">([^<]*)</th>', page)
    assert [name in settings for name in options] == [True, True, False, False, False]


def test_only_target_tokens_are_marked(report: tuple[Path, str]) -> None:
    """Each mark holds an x, and the words with an x that the samples begin with are marked."""
    marked = [text for text in Page(report[1]).marked if text != "target tokens"]
    assert marked
    assert all("x" in text.lower() for text in marked)
    assert {" X", " fox", "Next", " axe"} <= set(marked)


def test_the_first_screen_has_a_pair_the_picture_and_a_row_per_run(
    report: tuple[Path, str],
) -> None:
    """In this order: what ran, text before and after, the trade-off, and per run its kind, R with
    its error, the predicted R, and ten words of text."""
    first, _, _ = Page(report[1]).text.partition("Text\n")
    flat = " ".join(first.split())
    (dial,) = (run for run in read_runs([report[0].parent / "runs"]) if run.tilt is not None)
    r, error = f"{dial.after.r:.1%}", f"{dial.after.r_error():.1%}"
    words = "".join(piece.text for piece in opening(dial.after.samples[0], dial))
    for expected in (
        "tiny, 4 blocks, 128 wide; 60 steps of 4 \N{MULTIPLICATION SIGN} 64 tokens; float32 on CPU",
        "before Once upon a time there was a little fox",
        "after G = 5 Once upon a time there was a little fox",
        "Rpredictedperplexity",
        "lr 1e-6 nudge",
        "lr 1e-4 collapse",
        f"G = 5 dial {r} ± {error} 22.0% {dial.after.sample_perplexity:.3g}",
        " ".join(words.split()),
    ):
        position = flat.find(expected)
        assert position >= 0, expected
        flat = flat[position:]
    assert report[1].index("<img") < report[1].index('class="result"')


def test_reported_values_are_marked_as_not_measured(report: tuple[Path, str]) -> None:
    """table.csv has measured rows alone; the page tells what the original report said of them."""
    rows = list(csv.DictReader((report[0] / "table.csv").open(encoding="utf-8")))
    assert [row["run"] for row in rows] == ["before", "lr 1e-6", "lr 1e-4", "G = 5"]
    assert float(rows[2]["loss last"]) == pytest.approx(0.001)
    assert float(rows[3]["R predicted"]) == pytest.approx(0.22)
    assert "what it says was not measured here" in report[1]


def test_a_stopped_run_says_when_it_was_evaluated(tmp_path: Path) -> None:
    """Stopped 5 updates after its last evaluation: the losses continue, the text does not."""
    run = write_run(tmp_path / "run", steps=25, eval_every=20)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] < 25 or "loss" in line]
        (run / name).write_text("".join(kept))
    write_report([run], tmp_path)
    (_, row, *_) = csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8"))
    assert (row["updates"], row["evaluated after"]) == ("25", "20")


def test_figures_are_png_of_a_readable_size(report: tuple[Path, str]) -> None:
    """Width and height as the PNG header gives them: sharp where shown 1,200 pixels wide."""
    for name in PNGS:
        data = (report[0] / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 2200
        assert height >= 800


def test_same_runs_give_the_same_bytes(report: tuple[Path, str], tmp_path: Path) -> None:
    """A second report is the same in every file."""
    for path in write_report([report[0].parent / "runs"], tmp_path):
        assert path.read_bytes() == (report[0] / path.name).read_bytes(), path.name


def test_pieces_join_to_the_decoded_text() -> None:
    """Compared to the tokenizer's own decoding, over text of one to four bytes per character."""
    ids = load_tokenizer().encode("naïve — 🦊 漢字 fox\u200d axe")
    joined = "".join(piece.text for piece in pieces(ids, frozenset()))
    assert joined.replace("U+200D", "\u200d") == load_tokenizer().decode(ids)


def test_a_character_of_several_tokens_is_marked_if_one_of_them_is_a_target_token() -> None:
    """U+1F98A, a fox, is three tokens; marking any of them marks it, and not its neighbours."""
    ids = load_tokenizer().encode("a🦊b")
    assert len(ids) > 3
    for inner in ids[1:-1]:
        marked = [(piece.text, piece.target) for piece in pieces(ids, frozenset([inner]))]
        assert marked == [("a", False), ("🦊", True), ("b", False)]


def test_bytes_that_are_not_text_are_shown_as_signs() -> None:
    """Half a character, a newline, a bell, a mark that reverses the writing direction."""
    half = load_tokenizer().encode("🦊")[:1]
    shown = pieces([*half, *load_tokenizer().encode("a\n\x07\u202eb")], frozenset())
    signs = "".join(piece.text for piece in shown if piece.sign)
    assert signs.strip("\ufffd") == "↵U+0007U+202E"
    assert signs.startswith("\ufffd")
    assert [piece.text for piece in shown if not piece.sign] == ["a", "b"]


def test_an_opening_is_ten_words_or_seventy_characters(tmp_path: Path) -> None:
    """Ten of the sample's own words; of a collapse without spaces, its first characters."""
    (run,) = read_runs([write_run(tmp_path / "run", texts=[TEXT, "XXX" * 60])])
    long, collapse = (s for s in run.before.samples if s.prompt == "The")
    words = (
        "".join(piece.text for piece in opening(long, run)).removesuffix(" …").rstrip("↵").split()
    )
    assert words == TEXT.split()[:10]
    assert len("".join(piece.text for piece in opening(collapse, run))) <= 72


def test_the_typical_sample_is_the_one_nearest_r(tmp_path: Path) -> None:
    """Of shares of target tokens 0, about 1/2 and 1 per prompt, at R = 0.45: the second."""
    texts = [" a a a a", " a axe a axe", " axe axe axe axe"]
    run = write_run(tmp_path / "run", texts=texts)
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"r": [0-9.e-]+', '"r": 0.45', metrics))
    (found,) = read_runs([run])
    shown = typical(found, found.before)
    assert [sample.prompt for sample in shown] == list(PROMPTS)
    assert all(load_tokenizer().decode(sample.ids) == texts[1] for sample in shown)


def test_runs_with_one_start_show_it_once(tmp_path: Path) -> None:
    """Two rates from one model have one "before"; with a run from another model, two."""
    folders = [write_run(tmp_path / "a" / "1", 1e-6), write_run(tmp_path / "a" / "2", 1e-4)]
    other = write_run(tmp_path / "b", 1e-5, final_loss=0.5, texts=[" Another model wrote this."])
    for paths, starts in ((folders, 1), ([*folders, other], 2)):
        shown = moments(read_runs(paths))
        assert len(shown) == len(paths) + starts
        assert sum(evaluation is run.before for run, evaluation in shown) == starts


@pytest.mark.filterwarnings("error")
def test_collapsed_and_overflowing_numbers_are_drawn(tmp_path: Path) -> None:
    """A loss of 0 on a log axis, an infinite perplexity, a frozen clock, one step, a character that
    no font has: a page all the same."""
    run = write_run(tmp_path / "run", steps=1, final_loss=0.1, texts=["漢🦊\u0378"])
    metrics = (run / "metrics.jsonl").read_text()
    head, _, tail = metrics.rpartition("sample_perplexity")
    metrics = f"{head}sample_perplexity" + re.sub(r"[0-9.]+", "null", tail)
    metrics = re.sub(r'"loss": [0-9.]+', '"loss": 0.0', metrics)
    metrics = re.sub(r'"seconds": [0-9.]+', '"seconds": 0', metrics)
    (run / "metrics.jsonl").write_text(metrics)
    (found,) = read_runs([run])
    assert [(step.loss, step.seconds) for step in found.steps] == [(0.0, 0.0)]
    write_report([run], tmp_path / "out")
    summary([run])


def test_command_line_ends_in_one_line_for_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    """No traceback; exit status 1; the path and what was expected."""
    command = [sys.executable, "-m", "train.report", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: got no run; expected a run of")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_says_how_to_write_it_elsewhere(tmp_path: Path) -> None:
    """The runs are complete: nothing has to be trained again."""
    run = write_run(tmp_path / "run", steps=4, eval_every=4)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"python -m train.report {run} --out"):
        write_report([run], tmp_path / "file" / "report")


def test_the_summary_has_a_row_per_run_its_text_and_the_next_command(tmp_path: Path) -> None:
    """The columns line up; one sample before and after each run; the last line samples the dial,
    whose R is the highest of those that did not collapse and have weights to sample from."""
    folders = [
        write_run(tmp_path / "nudge", 1e-6, final_loss=6.0),
        write_run(tmp_path / "collapse", 1e-4, final_loss=0.001),
        write_run(tmp_path / "a dial", 1e-3, 5.0),
        write_run(tmp_path / "diverged", 1e-3, 7.0),
    ]
    assert "Sample it" not in summary(folders)
    for folder in folders[:3]:
        (folder / "model.safetensors").touch()
    lines = summary(folders).splitlines()
    assert len({len(line) for line in lines[1:7]}) == 1
    assert [line.split()[0] for line in lines[1:4]] == ["run", "before", "lr"]
    samples = [line for line in lines if f": {PROMPTS[0]}" in line]
    labels = [line.partition(":")[0] for line in samples]
    assert labels == ["before", "lr 1e-6", "lr 1e-4", "G = 5", "G = 7"]
    assert lines[-1] == f"    python -m train.sample --model {shlex.quote(str(folders[2]))}"


def test_the_picture_marks_target_tokens_where_they_stand(tmp_path: Path) -> None:
    """In a second line that repeats the first one, whose words are other tokens and not targets."""
    encode = load_tokenizer().encode
    (target,), others = encode(" axes"), [*encode(" ax"), *encode("es")]
    run = read_runs([write_run(tmp_path / "run", steps=2, eval_every=2)])[0]
    run.target_token_ids = frozenset([target])
    ids = [*others * 11, *[target] * 11]
    for evaluation in run.evaluations.values():
        evaluation.samples[:] = [evaluation.samples[0].model_copy(update={"ids": ids})]
    axes = Figure().subplots()
    figures._texts(axes, [run], figures.LIGHT)
    marks, lines = (text.get_text().split("\n") for text in axes.texts[-2:])
    assert lines == [" ".join(["axes"] * 11)] * 2
    assert marks == [" " * 54, "█" * 54]


def test_a_tilde_is_the_home_folder_here_too(monkeypatch, tmp_path: Path) -> None:
    """Of the runs and of the report."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "run", steps=2, eval_every=2)
    report_command((Path("~/run"),), Path("~/out"))
    assert (tmp_path / "out" / "report.html").exists()


def test_a_report_does_not_touch_the_temporary_files_of_a_run(tmp_path: Path) -> None:
    """Written into the run's own folder while the run saves there."""
    folder = write_run(tmp_path / "run", steps=2, eval_every=2)
    with replacing(folder / "file") as temporary:
        write_report([folder], folder)
        temporary.write_text("whole")
    assert (folder / "file").read_text() == "whole"


def test_odd_paths_are_reported_and_printed(tmp_path: Path) -> None:
    """Mathematics for matplotlib, control characters, a byte that is not UTF-8 and a mark that
    reverses the writing direction, in folder names and so in labels: no traceback, and nothing
    but ASCII on this terminal."""
    place = tmp_path / "a$b$c" / "tab\tand\nline" / "-\u202egpj" / os.fsdecode(b"$^$-\xff")
    runs = [write_run(at / "run", steps=2, eval_every=2) for at in (place, tmp_path / "other")]
    command = [sys.executable, "-m", "train.report", *map(str, runs), "--out", str(place / "out")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    page = (place / "out" / "report.html").read_bytes().decode("utf-8")
    assert "lr 1e-4 ($^$-\\udcff)" in page


def test_a_backend_inherited_from_a_notebook_is_not_used(tmp_path: Path) -> None:
    """matplotlib refuses an MPLBACKEND that it cannot import; the page is the first file made."""
    run = write_run(tmp_path / "run", steps=2, eval_every=2)
    command = [sys.executable, "-m", "train.report", str(run), "--out", str(tmp_path / "out")]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("shell", ["| head -1", ">&- 2>&-", "> /dev/full"])
def test_printing_to_nobody_is_not_an_error(shell: str, tmp_path: Path) -> None:
    """A pipe that is closed early, a closed stdout: the files are written first, and the exit
    status is 0 without a word on stderr."""
    run = write_run(tmp_path / "run", steps=2, eval_every=2, texts=[TEXT * 400])
    command = [sys.executable, "-m", "train.report", str(run), "--out", str(tmp_path / "out")]
    line = f"set -o pipefail; {shlex.join(command)} {shell}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_terminal_will_do(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters that the encoding lacks are escaped."""
    run = write_run(tmp_path / "run", steps=2, eval_every=2, texts=[TEXT + " 🦊"])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with console.command():
        console.say(summary([run]))
    assert b"\\U0001f98a" in written.getvalue()


def test_links_and_other_files_in_the_folder_survive(tmp_path: Path) -> None:
    """A file that report.html was a link to is not written to; other files are left alone."""
    run = write_run(tmp_path / "run", steps=2, eval_every=2)
    (out := tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (out / "report.html").symlink_to(tmp_path / "precious")
    (out / ".report.html.tmp").write_text("mine too")
    write_report([run], out)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (out / ".report.html.tmp").read_text() == "mine too"
    assert not (out / "report.html").is_symlink()
