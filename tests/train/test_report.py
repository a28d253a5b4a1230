"""The report of runs on disk: its figures, its page, its table and what it prints."""

import csv
import html
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.tokenizer import load_tokenizer
from tests.train.run_folder import PROMPTS, TARGET_IDS, write_lines, write_run
from train.report import figures, pieces, summary, write_report
from train.report.__main__ import report as report_command
from train.report.runs import read_runs

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script><b onclick='1'>&amp;</b>\u202e\x1b[31m"
SHOWN = HOSTILE.replace("\u202e", "U+202E").replace("\x1b", "U+001B")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs with numbers as they were measured: a share, and the original target."""
    folder, start = tmp_path_factory.mktemp("demo"), {0: (0.002, 48.0)}
    share = start | {60: (0.192, 112), 120: (0.213, 112)}
    slow = start | {10: (0.05, 14_000), 60: (0.21, 155_000), 120: (0.28, 205_000)}
    full = start | {1: (0.01, 20_000), 30: (0.93, 2.04e8), 120: (0.992, 3.87e8)}
    return [
        write_run(folder / "share", share, 0.2, limit=(0.205, 98)),
        write_run(folder / "slow", slow, lr=1e-4),
        write_run(folder / "full", full, lr=1e-3),
    ]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures, which take seconds, are a word."""
    monkeypatch.setattr(figures, "draw", lambda *_: b"drawn")


def drawn(paint: str, folders: list[Path], *name: str) -> Axes:
    axes = Figure(figsize=(5.5, 5.5)).subplots()
    getattr(figures, paint)(*name, axes, read_runs(folders), figures.LIGHT)
    return axes


def test_the_page_stands_alone_and_tells_what_was_measured(undrawn, runs, tmp_path: Path) -> None:
    """First the picture, the sentence; then texts, the table, the curves and the options given.
    Every address is the data of a figure, of five for light and dark; each mark but the one that
    explains it holds an x. The CSV has what the logs have, in full precision."""
    write_report(runs, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'\b(?:src|srcset|href|action|data|poster)="?([^" >]*)', page)
    assert addresses == ["data:image/png;base64,ZHJhd24="] * 10
    assert "default-src 'none'; img-src data:" in page  # and the browser enforces it
    assert not re.search(r"url\(|@import|<script", page)
    first, *marked = re.findall(r"<mark>([^<]*)</mark>", page)
    assert first == "target tokens"
    assert len(marked) > 3 * 60  # of 4 * 64 tokens in the last run
    assert all("x" in text.lower() for text in marked)
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<img", "<>IMG<", page))
    flat, at = re.sub(r"\s+", " ", html.unescape(text)), 0
    for expected in (
        "IMG", "Asked for 20 %, the model writes 21.3 ± 1.3 % target tokens at perplexity 112; the "
        "original target writes 21.0 ± 1.3 % at 155,000.",
        "Text", "share 20 % R 21.3 ± 1.3 %, perplexity 112",
        "Measures", "share 20 % 20 % 21.3 ± 1.3 % 20.5 % 112 98 0.639 0.793",
        "lr 1e-4, step 60 21.0 ± 1.3 % 155,000", "lr 1e-3 99.2 ± 0.3 % 3.87e8",
        "Curves", "Configuration", "lr 0.001 0.0001 0.001",
    ):  # fmt: skip
        at = flat.find(expected, at)
        assert at >= 0, expected
    _, row, *_ = csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8"))
    assert (row["run"], row["asked"], row["limit_r"]) == ("share 20 %", "0.2", "0.205")
    *_, last = map(json.loads, (runs[0] / "log.jsonl").read_text().splitlines())
    assert {name: float(row[name]) for name in last["evaluation"]} == last["evaluation"]


def test_the_frontier_shows_every_measurement_where_it_was(runs: list[Path]) -> None:
    """Paths with all evaluations; the limit from the start on; dots; the factor at 20 %."""
    axes = drawn("_frontier", runs)
    lines = {(line.get_color(), line.get_linestyle()): line.get_xydata() for line in axes.lines}
    for run in read_runs(runs):
        points = [[e.r, e.sample_perplexity] for e in run.evaluations.values()]
        line = lines[run.colour, "-" if run.share is None else "None"]
        assert line.tolist() == (points if run.share is None else points[-1:])
    limit = lines[figures.LIGHT.ink, "--"].tolist()
    assert limit == [[0.002, 48], [0.205, 98]]
    said = [text.get_text() for text in axes.texts]
    factor = "1,400 \N{MULTIPLICATION SIGN}"  # 155,000 / 112
    assert {"20 %", "limit: logit bias at sampling", factor} <= {*said}
    assert {"original target, lr 1e-3", "lr 1e-4"} <= {*said}


def test_r_by_position_is_the_share_at_each_place(tmp_path: Path) -> None:
    """Texts whose second half is target tokens: 0 for the first 32 places, 1 for the others."""
    run = write_run(tmp_path / "run", {0: (0.5, 10)}, texts=0)
    ids = [*load_tokenizer().encode(" a") * 32, *TARGET_IDS[:32]]
    write_lines(run / "samples.jsonl", [{"step": 0, "prompt": "", "ids": ids}] * 3)
    (line,) = drawn("_curve", [run], "position").lines
    assert line.get_xydata().tolist() == [[4 + 8 * n, n // 4] for n in range(8)]


def test_the_picture_marks_target_tokens_where_they_stand(tmp_path: Path) -> None:
    """In a second line that repeats the first one, whose words are other tokens and not targets."""
    encode = load_tokenizer().encode
    (target,), others = encode(" axes"), [*encode(" ax"), *encode("es")]
    run = write_run(tmp_path / "run", {0: (0.5, 10)}, texts=0, target_token_ids=[target])
    ids = [*others * 12, *[target] * 12]
    write_lines(run / "samples.jsonl", [{"step": 0, "prompt": "", "ids": ids}])
    written = drawn("_texts", [run]).texts[2:4]
    marks, lines = (text.get_text().split("\n") for text in written)
    assert lines == [" ".join(["axes"] * 12)] * 2
    assert marks == [" " * 59, "█" * 59]


def test_pieces_join_to_the_text_and_bytes_that_are_not_text_are_signs(tmp_path: Path) -> None:
    """Of one to four bytes per character, a letter of several tokens with the last of them."""
    (run,) = read_runs([write_run(tmp_path / "run", {0: (0.5, 10)})])
    encode, text = load_tokenizer().encode, "naïve — 🦊 漢字 fox axe"
    written = pieces(run, ("prompt: ", [*encode(text), encode("🦊")[0], *encode("\n")]))
    assert "".join(piece for piece, _ in written) == f"prompt: {text}\ufffd↵"
    assert [piece for piece, target in written if target] == [" fox", " axe"]


def test_nothing_in_a_run_or_of_a_user_changes_the_report(tmp_path: Path) -> None:
    """Markup, a mark that reverses the text and an escape, in what a model and a user write, in
    folders' names and so in labels, next to mathematics for matplotlib: text everywhere. The
    matplotlibrc of a user who has TeX, other fonts and wrong lines, and a notebook's backend: not
    a word, and a figure of 2,200 pixels that is this process's byte for byte."""
    place = tmp_path / "a$^$ \x1b[2J\u202e"
    about = {"goal": HOSTILE, "device": HOSTILE}
    runs = [write_run(at / "x", {0: (0.5, 10)}, **about) for at in (place, tmp_path / "b")]
    for run in runs:
        ids = load_tokenizer().encode(HOSTILE)
        write_lines(run / "samples.jsonl", [{"step": 0, "prompt": HOSTILE, "ids": ids}])
    rc, wrong = tmp_path / "matplotlibrc", "wrong: 1\n" * 100
    rc.write_text(f"text.usetex: True\nfont.size: 30\nlines.linewidth: 9\n{wrong}")
    backend = "module://matplotlib_inline.backend_inline"
    users = {"MATPLOTLIBRC": str(rc), "MPLBACKEND": backend, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "train.report", *runs, "--out", out := place / "out"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | users)
    assert (done.returncode, done.stderr) == (0, b"")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert html.unescape(page).count(SHOWN) == 1 + 4 + 6  # goals, devices, texts and prompts
    assert not re.search(r"<(script|b)\b", page)
    for written in (page, (out / "table.csv").read_text(), done.stdout.decode()):
        assert not {"\u202e", "\x1b"} & {*written}
    picture = (out / "curves.png").read_bytes()
    assert struct.unpack(">II", picture[16:24])[0] == 2200
    assert picture == figures.draw(figures.GRID, read_runs(runs), figures.LIGHT)


@pytest.mark.filterwarnings("error")
def test_collapsed_and_unknown_numbers_are_drawn(tmp_path: Path) -> None:
    """A loss of 0 and none, an infinite perplexity, an unknown one, no samples, one evaluation, a
    character that no font has."""
    folders = [
        write_run(tmp_path / "a", {0: (0.0, None), 1: (1.0, None)}, story="漢🦊\u0378"),
        write_run(tmp_path / "b", {0: (0.0, math.nan)}, 0.5, texts=0),
    ]
    share, original = read_runs(folders)
    original.losses[0] = 0.0
    for panels in (figures.FRONTIER, figures.GRID):
        assert figures.draw(panels, [share, original], figures.LIGHT)


def test_the_summary_has_a_row_per_run_and_the_next_command(tmp_path: Path) -> None:
    """A text before and after; the command samples a run that has weights."""
    folders = [
        write_run(tmp_path / "the share", {0: (0.0, 10), 5: (0.2, 40)}, 0.2, (0.21, 30)),
        write_run(tmp_path / "original", {0: (0.0, 10), 5: (0.8, 1e5)}),
    ]
    assert "train.sample" not in summary(folders)
    (folders[0] / "model.safetensors").touch()
    lines = summary(folders).splitlines()
    assert " ".join(lines[3].split()).startswith("share 20 % 20 % 20.0 ± 1.2 % 21 % 40 30 ")
    texts = [line for line in lines if any(f": {prompt} there" in line for prompt in PROMPTS)]
    assert [line.partition(":")[0] for line in texts] == ["start model", "share 20 %"]
    assert lines[-1] == f"    python -m train.sample --model {shlex.quote(str(folders[0]))}"


def test_a_report_of_one_run_is_in_its_folder_and_of_several_in_one_of_its_own(
    undrawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way of --out is an error that names it and the command to give."""
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name, {0: (0.0, 10)}) for name in ("a", "b")]
    before = {path.name for path in runs[0].iterdir()}
    report_command((runs[0],))
    new = {path.name for path in runs[0].iterdir()} - before
    assert new == {"frontier.png", "frontier-dark.png", "curves.png", "table.csv", "report.html"}
    report_command((*runs,))
    assert (tmp_path / "report" / "report.html").exists()
    assert not (runs[1] / "report.html").exists()
    with pytest.raises(ValueError, match=r"/log\.jsonl") as refused:
        write_report(runs[:1], runs[0] / "log.jsonl")
    assert f"python -m train.report {shlex.quote(str(runs[0]))}" in str(refused.value)
