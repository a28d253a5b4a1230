"""Reading runs back from disk, from folders that these tests write, whole and spoilt."""

import math
import re
from pathlib import Path

import pytest

from tests.train.run_folder import write_run
from train.evaluate import Evaluation
from train.folders import create
from train.results import read_runs
from train.run import Run


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


def test_an_infinite_perplexity_is_null_on_disk_and_infinite_again(tmp_path: Path) -> None:
    """JSON has no infinity, and other readers of metrics.jsonl would stop at Python's."""
    create(tmp_path / "runs", {"a": {"xfactor": {"options": {"lr": 1.0}}}})
    Run(tmp_path / "runs" / "a").evaluate(
        lambda: Evaluation(0.0, 0.5, math.inf, 2.0, [("The", [1])])
    )
    line = (tmp_path / "runs" / "a" / "metrics.jsonl").read_text()
    assert '"passage_perplexity": null' in line
    run = write_run(tmp_path / "run", steps=4, eval_every=4)
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([line, *metrics[1:]]))
    assert read_runs([run])[0].evaluations[0].passage_perplexity == math.inf


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
