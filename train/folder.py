"""The folder of a run: who may use it, its configuration, its logs. See `run.py` for the files."""

import errno
import fcntl
import json
import os
import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.command import expect
from weights import Layout
from weights.checkpoint import atomic_write

CONFIG, STATE, MODEL = "config.json", "state.pt", "model.safetensors"
LOG, SAMPLES = LOGS = ("log.jsonl", "samples.jsonl")
MAY_CHANGE = ("steps", "eval_every", "out")  # options of a run that continues
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF)  # the file system has none
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.tmp\w{6}")  # atomic_write's, safetensors'
Line = dict[str, Any]


@contextmanager
def open_folder(out: Path) -> Iterator[None]:
    """Create a run's folder, or check that it holds a run, and lock it against other commands.

    Raises ValueError if it is locked or holds something else, and instead of an OSError.
    """
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, out)
            names = {path.name for path in out.iterdir()} - {"lost+found"}  # of a new disk
            left = set(filter(TEMPORARY.fullmatch, names))  # by a command that was killed
            if names > left and read_config(out) is None:
                found = f"--out {out} holds {min(names - left)!r} and no run"
                raise ValueError(f"{found}; give a new or an empty folder")
            for name in left:
                (out / name).unlink()
            yield
        finally:
            os.close(descriptor)
    except BaseException as error:
        for path in created:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        if isinstance(error, OSError):
            advice = "fix this and give the same command again, or another --out"
            raise ValueError(f"cannot write to {out}: {error}; {advice}") from error
        raise


def _lock(descriptor: int, out: Path) -> None:
    """Lock the folder itself until it is closed, so that no lock file is left behind."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out} is locked by another command; wait until it ends") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"cannot lock {out}: the file system does not support it", stacklevel=2)


def read_config(out: Path) -> dict[str, Any] | None:
    """Return what a run's config.json holds under "xfactor"; None if there is no run."""
    try:
        about = {**json.loads((out / CONFIG).read_bytes())["xfactor"]}
        return about | {"options": {**about.get("options", {})}}
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{out / CONFIG}: {error!s:.200}; restore it") from error


def write_config(out: Path, layout: Layout, about: Mapping[str, Any]) -> None:
    """Write a run's config.json; `about` stands under "xfactor"."""
    versions = {name: version(name) for name in ("torch", "triton") if find_spec(name)}
    versions["python"] = platform.python_version()
    config = {**layout.config(), "xfactor": {**about, "versions": versions}}
    with atomic_write(out / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n")


def check_options(out: Path, options: Mapping[str, Any]) -> None:
    """Raise ValueError if a run has begun with another value of an option that matters."""
    saved = (read_config(out) or {"options": {}})["options"]
    for name, value in options.items():
        changed = name not in MAY_CHANGE and saved.get(name, value) != value
        if changed and has_begun(out):
            expected = f"{saved[name]}, which the run in {out} has; or give another --out"
            expect(False, name.replace("_", "-"), value, expected)


def check_origin(out: Path, about: Mapping[str, Any]) -> None:
    """Raise ValueError if a run has begun with another start model or text."""
    saved = read_config(out) or {}
    for name in ("start", "text"):
        if saved.get(name) != about[name] and has_begun(out):
            changed = f"the {name} of the run in {out} has changed since its first step"
            raise ValueError(f"{changed}; restore it, or give another --out")


def has_begun(out: Path) -> bool:
    """Return whether the run in a folder has logged a step."""
    return any("loss" in line for line in read_log(out))


def read_log(out: Path, name: str = LOG) -> list[Line]:
    """Return the lines of a log, without a last line that a kill cut off."""
    path = out / name
    try:
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        if not all(type(line["step"]) is int for line in lines):
            raise ValueError("a step is not a whole number")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: {error!s:.200}; restore it, or give another --out") from error
    return lines


def append(out: Path, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to a log."""
    with open(out / name, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def lines_until(out: Path, step: int) -> dict[str, list[Line]]:
    """Return the lines of each log up to `step` updates; no lines for 0, when nothing was saved.

    Raises ValueError unless there is a loss for each of these updates.
    """
    logs = {name: read_log(out, name) if step else [] for name in LOGS}
    kept = [x for x in logs[LOG] if x["step"] + ("loss" in x) <= step]  # loss n: update n + 1
    if [line["step"] for line in kept if "loss" in line] != [*range(step)]:
        raise ValueError(f"{out / LOG}: not the log of {step} steps; restore it")
    evaluated = {line["step"] for line in kept if "evaluation" in line}
    # Samples are logged before their evaluation, and a kill may come between.
    return {LOG: kept, SAMPLES: [x for x in logs[SAMPLES] if x["step"] in evaluated]}


def cut_logs(out: Path, step: int) -> tuple[set[int], int]:
    """Drop what was logged after `step` updates; for 0, everything.

    Returns the steps that were evaluated, and how many losses were dropped.
    """
    dropped = sum("loss" in line for line in read_log(out)) - step
    logs = lines_until(out, step)
    for name, lines in logs.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {line["step"] for line in logs[LOG] if "evaluation" in line}, dropped
