"""Saving a run so that a kill at any moment leaves a folder from which it goes on.

    model.safetensors               the weights of the newest save, as transformers reads them
    optimizer-000120.safetensors    Adam's state of that save, and the inputs' random state
    state-000120.json               its step; length and SHA-256 of these two files and the logs;
                                    that of what config.json says of the run
    metrics.jsonl, samples.jsonl    logs, which only grow

Why a save is whole or absent. It flushes the logs, then writes the weights into a staging folder
and the other two files under names that carry the step, each flushed; the save before has not been
touched. Then one rename puts the new weights in place: that is the save. Only after it are the
files of the save before removed. So at every moment model.safetensors is a whole file that a state
file describes, and what else that state names is whole too. Resuming looks for the state that
names the digest which model.safetensors has, checks the other files, and cuts what the logs have
beyond. Where there is no model.safetensors yet, the run goes on from its start.

Nothing is pickled, and a folder that does not verify is left as it is.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT2
from weights import load_weights, save_weights
from weights.checkpoint import FILE_NAME as MODEL
from weights.checkpoint import atomic_write, fsync

METRICS, SAMPLES = LOGS = ("metrics.jsonl", "samples.jsonl")
STAGING = ".saving"
GENERATOR = "inputs.generator"  # among the optimizer's tensors, beside "wte.weight.exp_avg"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of one parameter
REMEDY = (
    "it was edited, cut off or removed. Nothing has been changed: put the file back, or start anew "
    "with another --out"
)
BLOCK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Training:
    """All that changes from step to step, and so all that a save holds."""

    model: GPT2
    optimizer: torch.optim.Adam
    generator: torch.Generator  # of the inputs

    def tensors(self) -> dict[str, Tensor]:
        """Adam's state under the parameters' names, and the generator's."""
        tensors = {GENERATOR: self.generator.get_state()}
        for name, p in self.model.named_parameters():
            for key in MOMENTS:
                tensors[f"{name}.{key}"] = self.optimizer.state[p][key].detach().cpu().contiguous()
        return tensors

    def restore(self, weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Set everything to what was saved."""
        self.model.load_state_dict(weights)
        self.generator.set_state(tensors[GENERATOR])
        moments = {
            i: {key: tensors[f"{name}.{key}"].clone() for key in MOMENTS}  # out of the memory map
            for i, (name, _) in enumerate(self.model.named_parameters())
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def write_save(folder: Path, step: int, training: Training, previous: int, config: str) -> None:
    """Save `step` in place of `previous` (0 for none), in the order described above.

    Of the configuration it keeps the digest `config`, which `read_save` wants to see again.

    Raises ValueError if the folder cannot be written or a weight is not finite; the save before is
    then still the folder's.
    """
    optimizer_file, state_file = _names(step)
    staging = folder / STAGING
    try:
        for log in LOGS:
            fsync(folder / log)
        save_weights(training.model.state_dict(), staging)
        with atomic_write(folder / optimizer_file) as temporary:
            save_file(training.tensors(), temporary)
        files = {MODEL: _digest(staging / MODEL)}
        files |= {name: _digest(folder / name) for name in (optimizer_file, *LOGS)}
        with atomic_write(folder / state_file) as temporary:
            state = {"step": step, "config": config, "files": files}
            temporary.write_text(json.dumps(state, indent=1) + "\n")
    except (OSError, SafetensorError, ValueError) as error:
        sweep(folder, previous)  # the space may be what is missing
        raise ValueError(f"cannot save step {step} in {folder}: {error}") from error
    try:
        os.replace(staging / MODEL, folder / MODEL)
        fsync(folder)
    except OSError as error:
        raise ValueError(f"cannot save step {step} in {folder}: {error}") from error
    sweep(folder, step)


def read_save(folder: Path, training: Training, config: str) -> tuple[int, dict[str, int]]:
    """Set `training` to the newest save. Only reads; nothing is set where nothing was saved yet.

    Returns:
        Its step (0 for none), and the length of each log then.

    Raises:
        ValueError: a file is missing, or is not what was saved.
    """
    state = _newest_state(folder)
    if state is None:
        return 0, dict.fromkeys(LOGS, 0)
    step, files = state["step"], state["files"]
    if state["config"] != config:
        raise ValueError(f"{folder}/config.json is not what it was at step {step}; {REMEDY}")
    for name in (_names(step)[0], *LOGS):
        size, _ = files[name]
        if _digest(folder / name, size) != files[name]:
            raise ValueError(f"{folder / name} is not what step {step} saved; {REMEDY}")
    try:
        training.restore(load_weights(folder), load_file(folder / _names(step)[0]))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: cannot go on from step {step}: {error}") from error
    return step, {log: files[log][0] for log in LOGS}


def sweep(folder: Path, step: int) -> None:
    """Remove what a kill left behind, and the files of every save but that of `step`.

    The states go first: one without the weights that it names reads as a folder that was spoilt.
    """
    for pattern in ("state-*.json", "optimizer-*.safetensors", ".*.tmp", ".tmp*"):
        for path in folder.glob(pattern):
            if path.name not in _names(step):
                path.unlink(missing_ok=True)
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _newest_state(folder: Path) -> dict[str, Any] | None:
    """The state that model.safetensors belongs to; None where no save was ever completed."""
    states = [_read_state(path) for path in folder.glob("state-*.json")]
    if not (folder / MODEL).exists():
        if not states or (folder / STAGING / MODEL).exists():  # killed before the first rename
            return None
        raise ValueError(f"{folder / MODEL} is missing; {REMEDY}")
    found = _digest(folder / MODEL)
    matching = [state for state in states if state["files"][MODEL] == found]
    if not matching:
        steps = " or ".join(f"step {state['step']}" for state in states) or "any step"
        raise ValueError(f"{folder / MODEL} is not what {steps} saved; {REMEDY}")
    return max(matching, key=lambda state: state["step"])


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        optimizer_file, state_file = _names(state["step"])
        if (
            path.name != state_file
            or "config" not in state
            or state["files"].keys() != {MODEL, optimizer_file, *LOGS}
        ):
            raise ValueError("got the files of another save")
        for name, (size, _) in state["files"].items():
            if type(size) is not int:
                raise ValueError(f"{name}: got length {size!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}; {REMEDY}") from error
    return state


def _names(step: int) -> tuple[str, str]:
    return f"optimizer-{step:06d}.safetensors", f"state-{step:06d}.json"


def _digest(path: Path, size: int | None = None) -> list[Any]:
    """Length and SHA-256 of a file, or of its first `size` bytes where it has so many."""
    digest, length = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK if size is None else min(BLOCK, size - length)):
                digest.update(block)
                length += len(block)
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error
    return [length, digest.hexdigest()]
