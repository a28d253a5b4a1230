"""A folder of runs: made whole or not at all, reopened for the runs it was begun with, locked while
a command is at work in it.

Each learning rate's run has a folder of its own there, whose files `train.run` describes.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.saves import LOGS
from weights.checkpoint import atomic_write

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
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_configs(out: Path) -> dict[str, dict[str, Any]]:
    """The configurations of the runs in a folder by their names; ValueError where one cannot be."""
    configs = {path.parent.name: read_config(path) for path in sorted(out.glob(f"*/{CONFIG}"))}
    if not configs:
        raise ValueError(f"--resume {out}: got no */{CONFIG}, expected the --out of an earlier run")
    return configs


def read_config(path: Path) -> dict[str, Any]:
    """One config.json; ValueError where it is not what a run wrote."""
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        float(config["xfactor"]["lr"])
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
