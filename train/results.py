"""Runs read back from disk: what the report shows of the folders that `train.run` writes.

A run counts steps from 1 and measures step s before update s. So element i of a curve here, from 0,
is of the model after i updates, as an evaluation at step i is.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from train.folders import CONFIG
from train.saves import METRICS, SAMPLES

EXPECTED = (
    f"a run of python -m train.xfactor ({CONFIG}, {METRICS}, {SAMPLES}) or a folder of such runs"
)


@dataclass(frozen=True)
class Measures:
    """What `train.evaluate` measured of the model after some updates."""

    r: float
    r_top_k: float
    passage_perplexity: float
    sample_perplexity: float


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt, in token ids, without the prompt's."""

    prompt: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class RunRecord:
    """What is on disk of one learning rate's run, as far as it got."""

    folder: Path
    label: str  # the rate; and the folder it lies in, where another run has the same rate
    lr: float
    about: dict[str, Any]  # "xfactor" of config.json
    losses: list[float]  # nats
    masses: list[float]  # probability on the members
    seconds: list[float]  # of each step
    evaluations: dict[int, Measures]  # by updates done, ascending; 0 is the start
    samples: dict[int, list[Sample]]  # likewise

    @cached_property
    def members(self) -> frozenset[int]:
        """Ids of the tokens that were the goal."""
        return frozenset(self.about["member_ids"])


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in `paths`, each a run's folder or a folder of them, in that order, each once.

    A run that was killed is shown as far as its files go. In a folder of runs, those that have not
    done a step are left out.

    Raises:
        ValueError: no path; no run there; a file that is missing or not what a run writes.
    """
    runs = list({run.folder.resolve(): run for path in paths for run in _find(path)}.values())
    if not runs:
        raise ValueError(f"got no folder, expected {EXPECTED}")
    rates = [run.lr for run in runs]
    parents = [run.folder.resolve().parent for run in runs]
    common = os.path.commonpath(parents)
    return [
        replace(run, label=f"{run.label} ({os.path.relpath(parent, common)})")
        if rates.count(run.lr) > 1
        else run
        for run, parent in zip(runs, parents, strict=True)
    ]


def scientific(lr: float) -> str:
    """A learning rate as people write it: 1e-4, 2.5e-5, 0."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if lr else "0"


def _find(path: Path) -> list[RunRecord]:
    configs = [path / CONFIG] if (path / CONFIG).is_file() else sorted(path.glob(f"*/{CONFIG}"))
    if not configs:
        what = "no run" if path.is_dir() else "no folder"
        raise ValueError(f"{path}: got {what}, expected {EXPECTED}")
    started = [run for run in map(_read, [config.parent for config in configs]) if run.losses]
    if not started:
        raise ValueError(f"{path}: got no step, expected a run that has done at least one")
    return sorted(started, key=lambda run: run.lr)


def _read(folder: Path) -> RunRecord:
    about = _about(folder / CONFIG)
    lr = about["options"]["lr"]
    run = RunRecord(folder, scientific(lr), lr, about, [], [], [], {}, {})
    for where, line in _lines(folder / METRICS):
        with _expecting(where, '{"step", "loss", "mass", "seconds"} or {"step", "evaluation"}'):
            if "evaluation" in line:
                found = line["evaluation"].items()
                measures = {k: math.inf if v is None else float(v) for k, v in found}
                run.evaluations[int(line["step"])] = Measures(**measures)
            elif line["step"] != len(run.losses) + 1:
                raise ValueError(f"got step {line['step']} after step {len(run.losses)}")
            else:
                run.losses.append(float(line["loss"]))
                run.masses.append(float(line["mass"]))
                run.seconds.append(float(line["seconds"]))
    for where, line in _lines(folder / SAMPLES):
        with _expecting(where, '{"step", "prompt", "ids"}, at least one id'):
            sample = Sample(str(line["prompt"]), tuple(int(i) for i in line["ids"]))
            if not sample.ids:
                raise ValueError("got no id")
            run.samples.setdefault(int(line["step"]), []).append(sample)
    missing = ({0} if run.losses else set()) | run.evaluations.keys()
    if missing := missing - (run.evaluations.keys() & run.samples.keys()):
        raise ValueError(
            f"{folder}: got no evaluation or no samples after {sorted(missing)} updates, expected "
            f"both in {METRICS} and {SAMPLES}, and the start's among them"
        )
    return run


def _about(path: Path) -> dict[str, Any]:
    with _expecting(str(path), EXPECTED):
        about = json.loads(path.read_text(encoding="utf-8"))["xfactor"]
        about["options"]["lr"] = float(about["options"]["lr"])
        about["member_ids"] = [int(i) for i in about["member_ids"]]
        if missing := {"goal", "alpha", "beta", "versions", "device", "dtype"} - about.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    return about


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and the object on it; a last line that a kill cut off is left out."""
    with _expecting(str(path), EXPECTED):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        with _expecting(where, "a JSON object"):
            parsed = dict(json.loads(line))
        yield where, parsed


@contextmanager
def _expecting(where: str, expected: str) -> Iterator[None]:
    """Turn an error in reading a file into a ValueError: where, what was got, what was expected."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: no key {error}; expected {expected}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected {expected}") from error
