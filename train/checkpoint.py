"""A run on disk: one folder per run, logs that only grow, one checkpoint file, and how to resume.

    config.json             the model's configuration, as transformers reads it; under "xfactor" the
                            command's options, the goal and its token ids, versions and device
    metrics.jsonl           {"step", "loss", "target_probability", "seconds"}, measured before that
                            step's update; {"step", "evaluation"} after that many updates, from 0
    samples.jsonl           {"step", "prompt", "ids"}: the texts of those evaluations
    checkpoint.safetensors  weights, Adam's state, the data generator's state; in its metadata the
                            step, length and digest of both logs, digests of the run's origin
    model.safetensors       the weights alone, written when the run ends or is stopped

A save flushes the logs, then replaces checkpoint.safetensors atomically. Whenever the process is
killed, either there is no checkpoint and the run starts over, or the checkpoint is complete and the
logs hold at least what it records. Resuming cuts the logs to the recorded lengths and continues to
the same curve, samples and weights, bit for bit. Nothing is pickled. Only these files and a folder
for temporary files are ever written or removed, never through a link.
"""

import errno
import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from train.distributed import barrier, is_main
from train.evaluate import Evaluation
from weights.checkpoint import atomic_write, fsync

CONFIG, CHECKPOINT, MODEL = "config.json", "checkpoint.safetensors", "model.safetensors"
METRICS, SAMPLES = LOGS = ("metrics.jsonl", "samples.jsonl")
SAMPLED = "inputs.safetensors"  # in the folder of the runs: text sampled from the start model
LOST_FOUND = "lost+found"  # the only entry of a new ext4 file system
STAGING = ".xfactor.tmp"  # for temporary files; a killed process leaves it behind
ADAM = ("step", "exp_avg", "exp_avg_sq")  # the optimizer's state of one parameter
MAY_CHANGE = ("steps", "eval_every", "save_every", "out", "resume")  # options of a resumed run
MAY_MOVE = ("weights", "inputs", "tokens")  # those that name files, whose content must be the same
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF)  # the file system has none
State = tuple[nn.Module, torch.optim.Adam, torch.Generator]  # what a save holds


@contextmanager
def open_folder(out: Path, names: Sequence[str], resuming: bool) -> Iterator[None]:
    """Lock a folder for runs of these names against other commands; create it if it is missing.

    If a new command fails before any run has logged a step, nothing is left behind; else the error
    gets a note that says how to resume.

    Raises ValueError if the folder is locked or holds something else, and for any OSError.
    """
    created: list[Path] = []
    unused, kept = False, resuming
    with ExitStack() as stack:
        try:
            for path in reversed((out, *out.parents)):
                if not path.is_dir():
                    path.mkdir()
                    created.insert(0, path)
                    fsync(path.resolve().parent)
            descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, out)
            if not resuming:
                _check_unused(out, names)
                unused = True
            yield
        except BaseException as error:
            with suppress(OSError):  # report the first error
                kept = kept or (unused and not _remove_unused(out, names))
                for path in created:
                    path.rmdir()  # fails if it is not empty
            if kept:
                error.add_note(f"resume with --resume {shlex.quote(str(out))}")
            if isinstance(error, OSError):
                advice = "choose another --out, or --resume what was saved there"
                raise ValueError(f"cannot write to {out}: {error}; {advice}") from error
            raise


def _lock(descriptor: int, out: Path) -> None:
    """Lock the folder itself until it is closed, so that no lock file is left behind."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out} is locked by another process; wait until it ends") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"{out} is not locked, as its file system has no locks", stacklevel=2)


def _configs(out: Path) -> list[Path]:
    return sorted([*out.glob(f"lr-*/{CONFIG}"), *out.glob(f"tilt-*/{CONFIG}")])


def _check_unused(out: Path, names: Sequence[str]) -> None:
    if _configs(out):
        raise ValueError(f"--out {out} holds a run; choose another folder, or --resume {out}")
    for path in out.iterdir():
        found = {path.name}
        if path.name in names and path.is_dir():  # of a command killed before it wrote config.json
            found = {file.name for file in path.iterdir()}
        if found - {STAGING, LOST_FOUND}:
            raise ValueError(
                f"--out {out} contains {path.name!r} and no run; choose a new or an empty folder"
            )


def _remove_unused(out: Path, names: Sequence[str]) -> bool:
    """Remove the files of these runs by name, unless a run has logged a step; return whether."""
    folders = [out / name for name in names if (out / name).exists()]
    if any(b'"loss"' in log.read_bytes() for f in folders for log in f.glob(METRICS)):
        return False
    (out / SAMPLED).unlink(missing_ok=True)
    for folder in folders:
        for name in (*LOGS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    return True


def create(folder: Path, model_config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Create a run's folder, write its config.json, and create logs unless they are there."""
    versions = {name: version(name) for name in ("torch", "triton") if find_spec(name)}
    versions["python"] = platform.python_version()
    config = {**model_config, "xfactor": {**about, "versions": versions}}
    folder.mkdir(exist_ok=True)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1, default=str) + "\n")
    for log in LOGS:
        _open(folder / log).close()
    fsync(folder.parent)


def _open(path: Path) -> BinaryIO:
    """Open a log to append to, never through a link."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CREAT | os.O_APPEND
    return open(os.open(path, flags, 0o666), "ab")


@contextmanager
def replacing(path: Path, staging: str = STAGING) -> Iterator[Path]:
    """Yield a temporary file that atomically replaces `path`; clear what a kill left behind.

    staging: the name of the folder for it, one per program that may write beside another.
    """
    folder = path.parent / staging
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        with atomic_write(path, folder) as temporary:
            yield temporary
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_options(out: Path) -> dict[str, Any]:
    """Return the options of the runs in a folder, unchecked; ValueError if none can be read."""
    for path in _configs(out):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["xfactor"]["options"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__} {error}"[:200]
            raise ValueError(f"{path}: {reason}; expected what a run writes") from error
    raise ValueError(f"--resume {out}: got no run there, expected the --out of an earlier command")


def append_steps(folder: Path, step: int, results: list[list[float]], seconds: float) -> str:
    """Log the steps up to `step`: loss, target probability[, predicted] of each, their mean time.

    Returns "", or what is wrong if a loss is not finite; the steps before it are logged.
    """
    lines, problem = [], ""
    for n, (loss, *probabilities) in enumerate(results, step - len(results) + 1):
        if not math.isfinite(loss):
            problem = f"the loss became {loss} at step {n}"
            break
        named = zip(("target_probability", "predicted_probability"), probabilities, strict=False)
        lines.append({"step": n, "loss": loss, **dict(named), "seconds": seconds / len(results)})
    _append(folder / METRICS, lines)
    return problem


def append_evaluation(folder: Path, step: int, evaluation: Evaluation) -> str:
    """Log an evaluation; return "", or what is wrong if the logits were not finite."""
    if not evaluation.samples:
        return f"the logits became NaN or infinite after step {step}"
    lines = [{"step": step, "prompt": prompt, "ids": ids} for prompt, ids in evaluation.samples]
    _append(folder / SAMPLES, lines)
    numbers = {k: v for k, v in vars(evaluation).items() if k != "samples"}
    numbers = {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # as JSON needs
    _append(folder / METRICS, [{"step": step, "evaluation": numbers}])
    return ""


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with _open(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def save(folder: Path, step: int, state: State, origin: Mapping[str, str]) -> None:
    """Save the run, which then resumes after `step`; `origin` is what `read` will compare.

    Raises ValueError if the folder cannot be written; the previous checkpoint then stays.
    """
    model, optimizer, generator = state
    tensors = {"generator": generator.get_state()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in ADAM}
    try:
        for log in LOGS:
            fsync(folder / log)
        logs = {log: _length_and_digest(folder / log) for log in LOGS}
        write_tensors(folder / CHECKPOINT, tensors, {"step": str(step), **logs, **origin})
    except OSError as error:
        where = f"step {step} in {folder}"
        raise ValueError(f"cannot save {where}: {error}; {last_save(folder)}") from error


def _length_and_digest(path: Path, length: int | None = None) -> str:
    """Return the length and digest of a log, or of its first bytes."""
    data = path.read_bytes()[:length]
    return f"{len(data)} {sha256(data).hexdigest()}"


def save_model(folder: Path, model: nn.Module) -> None:
    """Write the weights alone, as load_weights and transformers read them."""
    write_tensors(folder / MODEL, dict(model.named_parameters()), {"format": "pt"})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file in one atomic step; raises OSError, also for a full disk."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(on_cpu, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def last_save(folder: Path) -> str:
    """Say after which step a run would resume."""
    try:
        with safe_open(folder / CHECKPOINT, "pt") as file:
            return f"step {int(file.metadata()['step'])} is the last one saved"
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return "no step was saved yet"


def read(
    folder: Path, model: nn.Module, origin: Mapping[str, str]
) -> tuple[int, dict[str, int], dict[str, Tensor]]:
    """Read a run's checkpoint: its step (0 without one), each log's length in bytes, the tensors.

    Raises ValueError unless its names, shapes, dtypes and steps are the run's, its values finite,
    and the logs and the run's origin those of its metadata.
    """
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        if (folder / MODEL).exists():  # written after the last save
            raise ValueError(f"{folder}: got no {CHECKPOINT}, without which a run does not resume")
        return 0, dict.fromkeys(LOGS, 0), {}
    expected = {"generator": torch.Generator().get_state()}
    for name, p in model.named_parameters():
        expected |= {f"model.{name}": p, f"exp_avg.{name}": p, f"exp_avg_sq.{name}": p}
        expected[f"step.{name}"] = torch.zeros(())
    try:
        tensors, metadata = read_tensors(path, expected)
        if missing := {"step", *LOGS, *origin} - metadata.keys():
            raise ValueError(f"got no {min(missing)!r} in its metadata")
        if changed := [key for key, value in origin.items() if metadata[key] != value]:
            raise ValueError(f"the run began with other {changed[0]} than are given now")
        step = int(metadata["step"])
        if any(tensors[name].item() != step for name in tensors if name.startswith("step.")):
            raise ValueError(f"Adam's state is not that of step {step}")
        lengths = {log: int(metadata[log].partition(" ")[0]) for log in LOGS}
        for log, length in lengths.items():
            if _length_and_digest(folder / log, length) != metadata[log]:
                raise ValueError(f"{log} is not the log of these {step} steps")
        torch.Generator().set_state(tensors["generator"])  # raises unless it is one
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: {str(error)[:300]}. Nothing has been changed: restore the run's files, or "
            "start another run with another --out"
        ) from error
    return step, lengths, tensors


def read_tensors(
    path: Path, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata; ValueError unless it is as expected, and finite."""
    try:
        with safe_open(path, "pt") as file:
            if unlike := sorted(set(file.keys()) ^ expected.keys()):
                what = "no" if unlike[0] in expected else "an unknown"
                raise ValueError(f"got {what} tensor {unlike[0][:80]!r}")
            tensors = {name: file.get_tensor(name) for name in expected}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"not a complete safetensors file: {error}") from error
    for name, tensor in tensors.items():
        got, like = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, expected[name]))
        if got != like:
            raise ValueError(f"{name}: got {got}, expected {like}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: got values that are not finite")
    return tensors, metadata


def resume(folder: Path, state: State, origin: Mapping[str, str]) -> int:
    """Restore a run from its checkpoint, see `read`, and cut its logs to it; returns the step."""
    model, optimizer, generator = state
    step, lengths, tensors = read(folder, model, origin)
    if step:
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict({name: tensors[f"model.{name}"] for name in names})
        moments = [{key: tensors[f"{key}.{name}"].clone() for key in ADAM} for name in names]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(enumerate(moments))})
        generator.set_state(tensors["generator"])
    barrier()  # every rank has read the logs that the main rank now cuts
    if is_main():
        for log, length in lengths.items():
            with _open(folder / log) as file:
                file.truncate(length)
    return step


def origin(options: Any, start: nn.Module, wanted: Tensor, inputs: str | Tensor) -> dict[str, str]:
    """Return digests of what must not change between the start of a run and its resumption.

    inputs: the ids of a text file, or the word for another source.
    """
    fixed = {k: v for k, v in vars(options).items() if k not in (*MAY_CHANGE, *MAY_MOVE)}
    return {
        "options": sha256(repr(sorted(fixed.items())).encode()).hexdigest(),
        "weights": digest(start.parameters()),
        "target tokens": digest([wanted]),
        "inputs": inputs if isinstance(inputs, str) else digest([inputs]),
    }


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of some tensors."""
    hashed = sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether something is due after this step; with `every` 0, after the last one only."""
    return step == last or (every > 0 and step % every == 0)
