"""A run on disk: one folder a learning rate, what is written there, and when it has diverged.

    config.json       the model's configuration, as transformers reads it; under "xfactor" the
                      options, the goal and its members, versions and device
    metrics.jsonl     {"step", "loss", "target_probability", "seconds"}: step s is measured before
                      update s; {"step", "evaluation"}: after that many updates, 0 being the start
    samples.jsonl     {"step", "prompt", "ids"}: the texts of those evaluations

and the files of the newest save, which `train.saves` describes. What the logs have beyond it is cut
when the run is resumed, and written anew.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.evaluate import Evaluation, NotFiniteError
from train.folders import CONFIG, digest, read_config, write_config
from train.saves import LOGS, METRICS, SAMPLES, Training, read_save, sweep, write_save


class Run:
    """One learning rate's folder, and the step that training has reached.

    Args:
        folder: made by `create`; ValueError where it holds no configuration.
        writes: False in every process but the first: it then reads, and writes nothing.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._config = digest(read_config(folder / CONFIG))
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
                    {"step": step, "loss": loss, "target_probability": mass, "seconds": seconds}
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
