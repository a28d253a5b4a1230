"""How a command talks: options, errors in one line, signals, a progress bar or plain lines."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import tyro
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from kernels import TwoLevelTarget
from train import checkpoint, distributed
from train.report import summary, write_report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal ends the command; its exit status is 128 + number."""

    def __init__(self, number: int, what_now: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{what_now}")
        self.number = number


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command: an error ends in one line, a signal with status 128 + number."""
    for name in ("stdout", "stderr"):  # closed, or unable to show every character
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    try:
        with _on_signals(interrupt):
            yield
    except ValueError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:  # its message goes on for lines about the allocator
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {reason} Try a smaller --batch, --dtype bfloat16 or --model gpt2")
    except Interrupted as stopped:
        if distributed.is_main():
            say(str(stopped), error=True)
        sys.exit(128 + stopped.number)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect signals instead of ending at the first; the second one ends the command at once."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    with _on_signals(collect):
        yield received


@contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in obeyed}  # the rest: as in nohup
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print a line on stdout or stderr, even if nobody reads it (`| head -1`)."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:  # also for what is still in its buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse_options(options_class: Any, arguments: Sequence[str], description: str | None) -> Any:
    """Return the options of a command line; after --resume FOLDER, those of the runs there.

    Raises ValueError for a value out of range, or one that the runs there do not have.
    """
    program = "python -m train.xfactor"
    options = tyro.cli(options_class, args=arguments, prog=program, description=description)
    if options.resume is not None:
        out = _expand(options.resume)
        values, names = checkpoint.read_options(out), [f.name for f in fields(options_class)]
        if unlike := sorted(set(names) ^ values.keys()):
            raise ValueError(f"{out}: the options in config.json are not a run's: {unlike[0]!r}")
        saved = _validated(options_class, values | {"out": out}, f"{out}, config.json: ")
        options = tyro.cli(options_class, args=arguments, default=saved)
        for name in names:
            was, given = getattr(saved, name), getattr(options, name)
            same = set(was) == set(given) if isinstance(was, tuple) else was == given
            if not same and name not in (*checkpoint.MAY_CHANGE, *checkpoint.MAY_MOVE):
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {given!r}, but the run in {out} has "
                    f"{was!r}; leave it out, or start another run with another --out"
                )
        options = replace(options, lr=saved.lr, contains=saved.contains, out=out)
    paths = {name: getattr(options, name) for name in checkpoint.MAY_MOVE}
    for name, path in paths.items():  # absolute, so that a run resumes from another folder
        if path not in ("", "random", "samples"):
            paths[name] = str(_expand(path).absolute())
    options = replace(options, out=_expand(options.out), **paths)
    return _validated(options_class, asdict(options))


def _expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def _validated(options_class: Any, values: dict[str, Any], where: str = "") -> Any:
    try:
        return TypeAdapter(options_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        message = f"{where}--{name} {str(first['input'])[:40]}: {first['msg']}"
        raise ValueError(message) from error


def describe(options: Any, goal: str, target: TwoLevelTarget) -> None:
    """Say what runs and where, before anything is waited for."""
    device, model = target.mask.device, options.weights or options.model
    where = distributed.device_name(device)
    path = "Triton kernels" if device.type == "cuda" else "PyTorch path"
    path = "F.log_softmax, F.kl_div" if options.loss == "unfused" else path
    say(
        f"{options.model + ' with random weights' if model == 'random' else model} in "
        f"{options.dtype} on {where}, {distributed.world_size()} rank(s), loss: {options.loss} "
        f"({path})\n{target.size} of {target.vocab_size} tokens are the goal: {goal}"
    )
    if device.type == "cpu" and options.model != "tiny" and model in (options.model, "random"):
        say(
            "No CUDA device was found. On a CPU the larger models take seconds per step, and 7 GiB "
            "of memory in gpt2-medium; --model tiny takes a minute."
        )
    if options.compile:
        say("compiling in the first step: about a minute")


def progress(label: str, done: int, total: int) -> tqdm:
    """Return a bar over the steps of a run, which shows itself on a terminal only.

    Its estimate covers steps alone if `unpause` is called after whatever else takes time.
    """
    hidden = None if distributed.is_main() else True  # None: unless it is on a terminal
    bar = tqdm(initial=done, total=total, unit="step", disable=hidden, mininterval=0, miniters=0)
    bar.desc = label  # which a hidden one does not keep
    return bar


def interval(bar: tqdm) -> float:
    """Return the seconds between two calls of `show`."""
    return 5.0 if bar.disable else 0.1


def show(bar: tqdm, step: int, measured: Sequence[float], speed: float, evaluating: bool) -> None:
    """Redraw the bar, or print a line where it is hidden: into a file or a pipe.

    measured: loss, target probability and, with a tilt, the predicted one.
    """
    loss, probability, *predicted = measured
    text = f"loss {loss:.4f}, target probability {probability:.4f}"
    text += "".join(f" of {p:.4f} predicted" for p in predicted) + f", {speed:,.0f} tokens/s"
    text += ", evaluating" * evaluating
    if bar.disable:
        say(f"{bar.desc}: step {step} of {bar.total}, {text}", error=True)
    else:
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)


def report(folders: Sequence[Path], out: Path) -> None:
    """Write the report and print it; a report that fails leaves finished runs as they are."""
    try:
        for path in write_report(folders, out):
            say(f"wrote {path}")
        say(summary(folders))
    except Exception as error:  # whatever it is, the runs are complete
        say(f"no report: {error}", error=True)
