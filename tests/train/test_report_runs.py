"""Reading runs back from disk: whole folders, interrupted ones and damaged ones."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.train.run_folder import write_run
from train.report.runs import best, read_runs


def test_runs_keep_the_order_of_the_command_line(tmp_path: Path) -> None:
    """Tilts first, then rates, both as given: neither sorted as numbers nor as folder names."""
    tilts, rates = [10.0, 3.0], [1e-3, 1e-5]
    for tilt in tilts:
        for lr in rates:
            options = {"lr": rates, "tilt": tilts}
            write_run(tmp_path / f"tilt-{tilt}-lr-{lr}", lr, tilt, steps=4, options=options)
    got = [(run.tilt, run.lr) for run in read_runs([tmp_path])]
    assert got == [(10.0, 1e-3), (10.0, 1e-5), (3.0, 1e-3), (3.0, 1e-5)]


def test_paths_keep_their_order_and_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    """Runs with the same settings are told apart by the folder they lie in."""
    second = write_run(tmp_path / "seed1" / "lr", 1e-4)
    first = write_run(tmp_path / "seed0" / "lr", 1e-4)
    labels = [run.label for run in read_runs([first, second, tmp_path / "seed0"])]
    assert labels == ["lr 1e-4 (seed0)", "lr 1e-4 (seed1)"]


def test_a_tilt_is_named_with_its_rate_only_where_rates_differ(tmp_path: Path) -> None:
    """G alone while all tilts share a rate; the original target's runs are named by rate."""
    folders = [write_run(tmp_path / "a", 1e-3), write_run(tmp_path / "b", 1e-3, 5.0)]
    assert [run.label for run in read_runs(folders)] == ["lr 1e-3", "G = 5"]
    folders.append(write_run(tmp_path / "c", 3e-4, 5.0))
    labels = [run.label for run in read_runs(folders)]
    assert labels == ["lr 1e-3", "G = 5, lr 1e-3", "G = 5, lr 3e-4"]


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
def test_a_killed_run_is_read_as_far_as_it_got(tmp_path: Path, log: str) -> None:
    """Each log cut at every byte, as a kill leaves it, beside a run that is whole.

    A loss that is cut off must not be read as a shorter number, and the whole run is always there.
    """
    write_run(tmp_path / "lr-a", 1e-5, steps=2, eval_every=2, texts=[" fox"])
    run = write_run(tmp_path / "lr-b", 1e-4, steps=3, eval_every=2, texts=[" fox"])
    whole = (run / log).read_bytes()
    steps = read_runs([run])[0].steps
    seen = set()
    for length in range(len(whole) + 1):
        (run / log).write_bytes(whole[:length])
        first, *rest = read_runs([tmp_path])
        assert len(first.steps) == 2
        for cut in rest:
            assert cut.steps == steps[: len(cut.steps)]
            assert 0 in cut.evaluations
            seen.add((len(cut.steps), max(cut.evaluations)))
    expected = {(1, 0), (2, 0), (2, 2), (3, 2), (3, 3)} if log == "metrics.jsonl" else {
        (3, 0), (3, 2), (3, 3)
    }  # fmt: skip
    assert seen == expected


def test_a_run_without_a_finished_step_is_left_out(tmp_path: Path) -> None:
    """All folders are made first: the second rate's logs are empty while the first is running."""
    write_run(tmp_path / "lr-1e-06", 1e-6)
    waiting = write_run(tmp_path / "lr-0.0001", 1e-4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (waiting / name).write_text("")
    assert [run.lr for run in read_runs([tmp_path])] == [1e-6]
    with pytest.raises(ValueError, match="got no finished step"):
        read_runs([waiting])


def test_an_infinite_perplexity_is_null_on_disk(tmp_path: Path) -> None:
    """JSON has no infinity; a perplexity too large for a float comes back as inf."""
    run = write_run(tmp_path / "run", steps=4, eval_every=4)
    metrics = (run / "metrics.jsonl").read_text()
    metrics = re.sub(r'"sample_perplexity": [0-9.]+', '"sample_perplexity": null', metrics)
    (run / "metrics.jsonl").write_text(metrics)
    assert read_runs([run])[0].after.sample_perplexity == math.inf


def test_predicted_r_and_the_error_of_r_are_their_formulas(tmp_path: Path) -> None:
    """The mean of predicted_probability, and sqrt(R (1 - R) / tokens)."""
    run = write_run(tmp_path / "run", tilt=5.0, steps=4, predicted=0.25)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        if "loss" in line:
            lines[i] = line | {"predicted_probability": line["step"] / 10}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = read_runs([run])
    assert found.predicted_r == pytest.approx(0.25)
    tokens = sum(len(sample.ids) for sample in found.after.samples)
    assert found.after.r_error() == pytest.approx(
        math.sqrt(found.after.r * (1 - found.after.r) / tokens)
    )


def test_kinds_follow_the_measures(tmp_path: Path) -> None:
    """R of 0.9 or a hundredfold perplexity is a collapse, with a tilt or without."""
    cases = {
        "nudge": (None, 0.005, 45),
        "collapse": (None, 0.95, 60),
        "dial": (5.0, 0.23, 125),
        "collapse by perplexity": (5.0, 0.23, 4801),
    }
    for name, (tilt, r, perplexity) in cases.items():
        run = write_run(tmp_path / name, 1e-3, tilt, steps=2, eval_every=2, final_loss=1.0)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        last["evaluation"] |= {"r": r, "sample_perplexity": perplexity}
        first = json.loads(lines[0])
        first["evaluation"] |= {"sample_perplexity": 48}
        lines = [json.dumps(first), *lines[1:-1], json.dumps(last)]
        (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        assert read_runs([run])[0].kind == name.split()[0]
    runs = read_runs([tmp_path / name for name in cases])
    assert best(runs).folder.name == "dial"
    assert best(runs[1::2]).folder.name == "collapse by perplexity"


DEEP = "[" * 20_000 + "]" * 20_000
HUGE = "1" + "0" * 400
STEP = '{"step": 1, "loss": 1, "target_probability": 0.5, "seconds": 1}\n'
DAMAGE = [
    ("config.json", '{"model_type": "gpt2"}', "no key 'xfactor'"),
    ("config.json", "not JSON", "Expecting value"),
    ("config.json", DEEP, "recursion"),
    ("config.json", "[]", "'list' object is not a mapping"),
    ("config.json", "null", "'NoneType' object is not a mapping"),
    ("config.json", ('"lr": 0.0001', f'"lr": {HUGE}'), "lr: got 1000"),
    ("config.json", ('"lr": 0.0001', '"lr": Infinity'), "lr: got inf: "),
    (
        "config.json",
        ('"device": "CPU"', '"device": ["CPU"]'),
        "got ['CPU']: Input should be a valid string",
    ),
    ("config.json", ('"target_token_ids": [', '"target_token_ids": [50257, '), "got 50257: "),
    ("config.json", ('"beta": 0.0, ', ""), "beta: got nothing: Field required"),
    (
        "config.json",
        ('"lr": [0.0001]', '"lr": 0.0001'),
        "lr: got 0.0001: Input should be a valid list",
    ),
    ("metrics.jsonl", STEP.replace('"loss": 1, ', ""), "line 1: loss: got nothing"),
    ("metrics.jsonl", STEP.replace('"step": 1', '"step": 2'), "got step 2 after"),
    ("metrics.jsonl", STEP.replace('"loss": 1', '"loss": NaN'), "got nan: "),
    ("metrics.jsonl", STEP.replace('"seconds": 1', '"seconds": -1'), "seconds: got -1: "),
    ("metrics.jsonl", STEP.replace("0.5", "1.1"), "target_probability: got 1.1: "),
    ("metrics.jsonl", STEP.replace('"loss": 1', f'"loss": {HUGE}'), "loss: got 1000"),
    (
        "metrics.jsonl",
        STEP.replace('"loss": 1', '"loss": [1]'),
        "got [1]: Input should be a valid number",
    ),
    ("metrics.jsonl", STEP.replace('"step": 1', '"step": "' + "1" * 10**6 + '"'), "step: got 111"),
    ("metrics.jsonl", '{"step": 0, "evaluation": {"r": 5}}\n', "r: got 5: "),
    ("metrics.jsonl", "[1]\n", "line 1: got [1]: Input should be a valid dictionary"),
    ("metrics.jsonl", DEEP + "\n", "recursion"),
    ("metrics.jsonl", b"\xff\n", "utf-8"),
    (
        "samples.jsonl",
        '{"step": 0, "prompt": "The", "ids": []}\n',
        "ids: got []: List should have at least 1 item",
    ),
    ("samples.jsonl", '{"step": 0, "prompt": ["The"], "ids": [1]}\n', "got ['The']: "),
    ("samples.jsonl", f'{{"step": 0, "prompt": "The", "ids": [{HUGE}]}}\n', "got 1000"),
    ("samples.jsonl", f'{{"step": {HUGE}, "prompt": "The", "ids": [1]}}\n', "got 1000"),
    ("samples.jsonl", None, "samples.jsonl"),
]


@pytest.mark.parametrize(
    ("file", "content", "expected"), DAMAGE, ids=[f"{file}-{got}" for file, _, got in DAMAGE]
)
def test_a_damaged_file_is_one_short_line(
    tmp_path: Path, file: str, content: str | bytes | tuple[str, str] | None, expected: str
) -> None:
    """It names the file, what is wrong with it, and what belongs there."""
    run = write_run(tmp_path / "run", steps=3)
    if content is None:
        (run / file).unlink()
    elif isinstance(content, bytes):
        (run / file).write_bytes(content)
    elif isinstance(content, tuple):
        text = (run / file).read_text()
        assert content[0] in text
        (run / file).write_text(text.replace(*content))
    else:
        (run / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        read_runs([run])
    assert str(run) in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(run))
