"""A run on disk: one folder a learning rate, what is written there, and when it has diverged.

    config.json       the model's configuration, as transformers reads it; under "xfactor" the
                      options, the goal and its members, versions and device
    metrics.jsonl     {"step", "loss", "mass", "seconds"}: step s is measured before update s;
                      {"step", "evaluation"}: after that many updates, 0 being the start
    samples.jsonl     {"step", "prompt", "ids"}: the texts of those evaluations

and the files of the newest save, which `train.saves` describes. What the logs have beyond it is cut
when the run is resumed, and written anew.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.evaluate import Evaluation, NotFiniteError
from train.saves import LOGS, METRICS, SAMPLES, Training, read_save, sweep, write_save
from weights.checkpoint import replacing

CONFIG = "config.json"
MAY_CHANGE = ("steps", "save_every", "eval_every", "out", "resume")  # options of a resumed run
MACHINE = ("versions", "device", "xfactor", "options")


def create(out: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `out` with a run's folder for each name and configuration: all of them or nothing.

    Raises ValueError if `out` holds anything already, or cannot be written.
    """
    out = out.resolve()
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, config in configs.items():
            (staging / name).mkdir(parents=True)
            write_config(staging / name, config)
            for log in LOGS:
                (staging / name / log).touch()
        os.rename(staging, out)  # onto an empty folder, never onto a full one
    except OSError as error:
        raise ValueError(f"--out {out}: cannot create it: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write or replace a run's config.json."""
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_configs(out: Path) -> dict[str, dict[str, Any]]:
    """The configurations of the runs in a folder by their names; ValueError where one cannot be."""
    configs = {path.parent.name: _read_config(path) for path in sorted(out.glob(f"*/{CONFIG}"))}
    if not configs:
        raise ValueError(f"--resume {out}: got no */{CONFIG}, expected the --out of an earlier run")
    return configs


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        float(config["xfactor"]["options"]["lr"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error!r}; expected what a run wrote there") from error
    return config


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a configuration says of the run itself."""
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode()).hexdigest()


def reopen(out: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold the runs in a folder against these configurations; only reads.

    Raises ValueError at a configuration that is not the one the run was begun with.
    """
    found = read_configs(out)
    for name, config in configs.items():
        was, now = _fixed(found.get(name, {})), _fixed(config)
        differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        if differing:
            raise ValueError(
                f"{out / name / CONFIG} was written for another run: {', '.join(differing)} differ "
                "from what its options give today. Nothing has been changed: put back what it was "
                "begun with, or start anew with another --out"
            )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a folder of runs from a second command; ValueError while another one has it.

    The lock is the operating system's and ends with the process, however that ends.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{out}: another command is at work there; wait until it ends"
            ) from error
        yield
    finally:
        os.close(folder)


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the run itself: not of its length, its place or the machine."""
    about = config.get("xfactor", {})
    options = {f"--{k}": v for k, v in about.get("options", {}).items() if k not in MAY_CHANGE}
    facts = {k: v for k, v in {**config, **about}.items() if k not in MACHINE}
    return facts | options


class Run:
    """One learning rate's folder, and the step that training has reached.

    Args:
        folder: made by `create`; ValueError where it holds no configuration.
        writes: False in every process but the first: it then reads, and writes nothing.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._config = digest(_read_config(folder / CONFIG))
        self.step = self.saved = 0  # updates done; those in the newest save
        self._pending: list[Tensor] = []  # (loss, mass) of steps not in metrics.jsonl yet
        self._latest = (math.nan, math.nan)
        self.diverged: DivergedError | None = None  # set at the first value that is not finite
        self._log_sizes = dict.fromkeys(LOGS, 0)
        self._since = time.perf_counter()

    def restore(self, training: Training) -> None:
        """Set `training` and `step` to the newest save, if there is one; see `read_save`."""
        self.step, self._log_sizes = read_save(self.folder, training, self._config)
        self.saved = self.step

    def begin(self, config: Mapping[str, Any]) -> None:
        """Cut the logs to the step restored, once all processes have read the folder.

        The configuration replaces the one found: its run is the same, its length may be another.
        """
        if self.writes:
            try:
                write_config(self.folder, config)
                for log, size in self._log_sizes.items():
                    os.truncate(self.folder / log, size)
                sweep(self.folder, self.saved)
            except OSError as error:
                raise ValueError(f"cannot go on in {self.folder}: {error}") from error
        self._since = time.perf_counter()

    def add(self, loss: Tensor, mass: Tensor) -> None:
        """Count a step. Its two scalars stay on the device until somebody looks."""
        self.step += 1
        if self.writes:
            self._pending.append(torch.stack([loss, mass]))

    def flush(self) -> tuple[float, float]:
        """Append the steps since the last call to metrics.jsonl; returns the latest loss and mass.

        The seconds of each are their mean, for in between nobody waited for the device.

        At a loss that is not finite, `diverged` is set; the steps before it are kept.
        """
        if self._pending:
            results = torch.stack(self._pending).tolist()
            self._pending.clear()
            seconds = (time.perf_counter() - self._since) / len(results)
            first = self.step - len(results) + 1
            finite = list(itertools.takewhile(lambda result: math.isfinite(result[0]), results))
            self._append(
                METRICS,
                [
                    {"step": step, "loss": loss, "mass": mass, "seconds": seconds}
                    for step, (loss, mass) in enumerate(finite, first)
                ],
            )
            if len(finite) < len(results):
                step, (loss, _) = first + len(finite), results[len(finite)]
                self._diverge(f"the loss became {loss} at step {step}", step - 1)
            loss, mass = results[-1]
            self._latest = (loss, mass)
        self._since = time.perf_counter()
        return self._latest

    def is_due(self, every: int, last: int) -> bool:
        """Whether something is to happen after this step; 0 means after the last one only."""
        return self.step == last or (every > 0 and self.step % every == 0)

    def evaluate(self, measure: Callable[[], Evaluation]) -> None:
        """Measure the model after `step` updates; in the first process, which writes it down.

        At logits that are not finite, `diverged` is set.
        """
        self.flush()
        if self.writes and self.diverged is None:
            try:
                evaluation = measure()
            except NotFiniteError as error:
                self._diverge(f"{error} after step {self.step}", self.step)
                return
            samples = evaluation.samples
            lines = [{"step": self.step, "prompt": prompt, "ids": ids} for prompt, ids in samples]
            self._append(SAMPLES, lines)
            self._append(METRICS, [{"step": self.step, "evaluation": evaluation.measures()}])
        self._since = time.perf_counter()

    def save(self, training: Training) -> None:
        """Make this step the one to go on from; see `write_save`.

        Nothing if it is already, or if the run has diverged.
        """
        self.flush()
        if self.writes and self.step > self.saved and self.diverged is None:
            try:
                write_save(self.folder, self.step, training, self.saved, self._config)
            except ValueError as error:
                raise ValueError(f"{error}; {self._kept()}") from error
            self.saved = self.step
        self._since = time.perf_counter()

    def _append(self, log: str, lines: Iterable[Mapping[str, Any]]) -> None:
        try:  # "r+": a log that somebody removed is an error, not a new one with a hole
            with open(self.folder / log, "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise ValueError(
                f"cannot write {self.folder / log}: {error}; {self._kept()}"
            ) from error

    def _diverge(self, what: str, finite_steps: int) -> None:
        advice = "Try a smaller --lr, with another --out"
        self.diverged = DivergedError(f"{what}; {self._kept()}. {advice}", finite_steps)

    def _kept(self) -> str:
        return f"step {self.saved} is the last one saved" if self.saved else "no step was saved yet"


class DivergedError(ValueError):
    """The loss or the logits are no longer finite; so many steps were."""

    def __init__(self, message: str, finite_steps: int) -> None:
        super().__init__(message)
        self.finite_steps = finite_steps
