"""Reading runs back from disk, and what is computed from them."""

import json
import math
import re
import tracemalloc
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.train.run_folder import write_lines, write_run
from train.report import _page, figures, finding
from train.report.runs import compare, read_runs

START = (0.0, 100.0)


def test_the_sentence_compares_the_middle_share_with_the_nearest_measurement(tmp_path) -> None:
    """Of three shares and two paths there and back, an infinite perplexity and a mass below 1
    aside; without paths, or with none within a quarter, the limit of the highest share; of paths
    alone the highest R."""
    folders = [
        write_run(tmp_path / f"share-{share}", {0: START, 9: (share, 200)}, share, (share, 150))
        for share in (0.5, 0.2, 0.05)
    ]
    far = {0: START, 4: (0.14, 1e3), 9: (0.8, 1e8)}
    near = {0: START, 3: (0.21, 4000), 4: (0.1, 3e3), 5: (0.2, math.inf), 9: (0.3, 1e6)}
    for lr, points in ((1e-3, far), (1e-4, near)):
        folders.append(write_run(tmp_path / f"{lr}", points, lr=lr))
    half = write_run(tmp_path / "half", {0: START, 9: (0.2, 300)})
    config = (half / "config.json").read_text()
    (half / "config.json").write_text(config.replace('"lr": 0.001', '"lr": 0.001, "mass": 0.5'))
    runs = read_runs([*folders, half])
    sentence = finding(runs)[1]
    assert sentence.startswith("Asked for 20 %, the model writes 20.0 ")
    assert sentence.endswith("% at 4,000.")
    assert (compare(runs)[1].label, compare(runs)[2]) == ("lr 1e-4", 3)
    assert [run.label for run in runs[3:]] == ["lr 1e-3", "lr 1e-4", "mass 0.5, lr 1e-3"]
    assert compare(runs[:3]) is None
    assert compare(runs[:4]) is None  # 14 % is more than a quarter from 20 %
    assert finding(runs[:3])[0].share == 0.5
    assert finding(runs[:3])[1].endswith("the limit writes 50 % at 150.")
    path, sentence = finding(runs[4:2:-1])
    assert path.label == "lr 1e-3"  # whose R is the higher one
    assert sentence.endswith("the start model writes 0.0 ± 0.0 % at 100.")
    axes = Figure().subplots()
    figures._frontier(axes, runs[5:], figures.LIGHT)
    assert axes.texts[0].get_text() == "mass 0.5, lr 1e-3"


def test_runs_are_ordered_and_told_apart(tmp_path: Path) -> None:
    """By share, then as given; by folder where labels collide; a folder given twice counts once."""
    points = {0: START, 1: (0.1, 200)}
    high, low = (write_run(tmp_path / f"{s}", points, s) for s in (0.5, 0.05))
    seeds = [write_run(tmp_path / f"seed{n}" / "run", points, lr=1e-4) for n in (1, 0)]
    runs = read_runs([seeds[0], high, *seeds, low])
    labels = ["share 5 %", "share 50 %", "lr 1e-4 (seed1/run)", "lr 1e-4 (seed0/run)"]
    assert [run.label for run in runs] == labels
    assert len({run.colour for run in runs}) == 4
    other = write_run(tmp_path / "other", points, start="another fingerprint")
    with pytest.raises(ValueError, match="several start models or goals"):
        read_runs([low, other])


def test_an_old_log_has_fewer_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but R are not known, so NaN, and written as nothing; null is an infinite perplexity."""
    monkeypatch.setattr(figures, "draw", lambda *_: b"drawn")
    run = write_run(tmp_path / "run", {0: START})
    config = json.loads((run / "config.json").read_text())
    config["xfactor"] = {k: config["xfactor"][k] for k in ("options", "target_token_ids")}
    (run / "config.json").write_text(json.dumps(config))
    lines = [{"step": 0, "evaluation": {"r": 0.1, "of the future": [1]}}, {"step": 0, "loss": 1.5},
             {"step": 1, "evaluation": {"r": 0.2, "sample_perplexity": None}}]  # fmt: skip
    write_lines(run / "log.jsonl", lines)
    (read,) = read_runs([run])
    assert [*read.losses] == [1.5]
    assert math.isnan(read.evaluations[0].sample_perplexity)
    assert read.end.sample_perplexity == math.inf
    assert (read.share, math.isnan(read.limit.r)) == (None, True)
    assert "nan" not in finding([read])[1] + re.sub("<[^>]*>", "", _page([read]))


def test_a_killed_run_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    """The last line of both logs is cut off; then all evaluations are."""
    run = write_run(tmp_path / "run", {0: START, 2: (0.5, 1e4)}, texts=3)
    for name in ("log.jsonl", "samples.jsonl"):
        (run / name).write_text((run / name).read_text()[:-5])
    (cut,) = read_runs([run])
    assert (len(cut.losses), [*cut.evaluations]) == (2, [0])
    assert {step: len(texts) for step, texts in cut.texts.items()} == {0: 3, 2: 2}
    write_lines(run / "log.jsonl", [{"step": 0, "loss": 7.0}])
    with pytest.raises(ValueError, match="nothing was measured yet"):
        read_runs([run])


@pytest.mark.parametrize(
    ("file", "line", "content"),
    [
        ("config.json", "", "[" * 20_000),
        ("log.jsonl", ", line 2", '{"step": 0, "loss": 1}\n{"step": 1, "loss": }\n'),
        ("log.jsonl", ", line 1", f'{{"step": 0, "loss": 1{400 * "0"}}}\n'),
        ("samples.jsonl", ", line 1", '{"step": 0, "prompt": "a", "ids": [0.5]}\n'),
    ],
)
def test_a_damaged_file_is_one_short_line(tmp_path, file: str, line: str, content: str) -> None:
    """It names the file, the line and what is wrong."""
    run = write_run(tmp_path / "run", {0: START})
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{run / file}{line}: ')}.*$") as error:
        read_runs([run])
    assert len(str(error.value)) < 400 + len(str(run))
    with pytest.raises(ValueError, match=f"expected a folder .*; give {tmp_path}/[*]$"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"^no run: give one"):
        read_runs([])


def test_long_logs_and_many_runs_take_little(tmp_path: Path) -> None:
    """20,000 steps: 16 bytes of memory for each at most; 200 such runs are drawn with no more
    points than a figure has pixels. A spike of one step stays; what is not finite is left out."""
    run = write_run(tmp_path / "run", {0: START})
    lines = (f'{{"step": {n}, "loss": {2 + n % 7}, "seconds": 1}}\n' for n in range(20_000))
    (run / "log.jsonl").open("a").writelines(lines)
    tracemalloc.start()
    (read,) = read_runs([run])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read.losses) == 20_000
    assert peak < 16 * 20_000 + 200_000
    for step, value in ((10, math.nan), (777, 50.0), (5_000, -50.0), (6_000, math.inf)):
        read.losses[step] = value
    kept = figures.thin(read.losses, 400)
    assert len(kept) <= 800
    assert {777, 5_000} <= {*kept}
    assert not {10, 6_000} & {*kept}
    axes = Figure().subplots()
    figures._curve("loss", axes, [read] * 200, figures.LIGHT)
    assert sum(len(line.get_xdata()) for line in axes.lines) < 10_000
