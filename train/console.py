"""What all commands share: options, one-line errors, signals, a progress bar or plain lines."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import tyro
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from kernels import TwoLevelTarget
from train import checkpoint, distributed
from train.report import summary, write_report
from weights import WeightsError
from weights.layout import expand, printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal ends the command; its exit status is 128 + number."""

    def __init__(self, number: int, details: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{details}")
        self.number = number


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command: an error ends in one line, a signal with status 128 + number."""
    for name in ("stdout", "stderr"):  # closed, or unable to show every character
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    try:
        with signals(patience=0):
            yield
    except BrokenPipeError:  # nobody reads the output any more
        sys.exit(1)
    except WeightsError as error:  # made printable, and may have several lines
        sys.exit(f"error: {error}")
    except (OSError, ValueError) as error:
        sys.exit(printable(f"error: {error}"))
    except RuntimeError as error:
        reason, *_ = str(error).splitlines() or [""]  # the rest is about the allocator
        if "out of memory" not in reason and "allocate memory" not in reason:  # CUDA's, the CPU's
            raise
        sys.exit(f"error: {reason} Try a smaller --batch, --dtype bfloat16 or --model gpt2")
    except Interrupted as stopped:
        if distributed.is_main():
            say("; ".join([str(stopped), *getattr(stopped, "__notes__", [])]), error=True)
        sys.exit(128 + stopped.number)
    finally:
        say("", end="")  # flush while an error can still be caught


@contextmanager
def signals(patience: int = 1) -> Iterator[list[int]]:
    """Collect up to `patience` signals; the next one ends the command at once."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        if len(received) == patience:
            raise Interrupted(number)
        received.append(number)

    # A signal that is ignored, as SIGHUP under nohup, stays ignored.
    obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, collect) for number in obeyed}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print on stdout or stderr; a reader that has gone (`| head -1`) is not an error."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:  # and drop what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse_options(options_class: Any, arguments: Sequence[str], description: str | None) -> Any:
    """Return the options of a command line; with --resume FOLDER, those of the runs there.

    Raises ValueError for a value out of range, or one that differs from what the runs have.
    """
    options = _parse(options_class(), arguments, description)
    if options.resume is not None:
        out, names = expand(options.resume), [f.name for f in fields(options_class)]
        values = checkpoint.read_options(out)
        if unlike := sorted(set(names) ^ values.keys()):
            got = "no" if unlike[0] in names else "an unknown"
            raise ValueError(f"{out}, config.json: got {got} option {unlike[0]!r}")
        saved = validated(options_class, values | {"out": out}, f"{out}, config.json: ")
        options = _parse(saved, arguments, description)
        order = {name: getattr(saved, name) for name in ("lr", "tilt", "contains")}
        for name in names:
            was, given = getattr(saved, name), getattr(options, name)
            reordered = name in order and set(was or ()) == set(given or ())
            fixed = name not in (*checkpoint.MAY_CHANGE, *checkpoint.MAY_MOVE)
            if fixed and was != given and not reordered:
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {given!r}, but the run in {out} has "
                    f"{was!r}; leave it out, or start another run with another --out"
                )
        if expand(options.out) != out:
            raise ValueError(f"--out {options.out}: leave it out, or give it as {out}, to resume")
        options = replace(options, **order, out=out)
    # safetensors refuses any other name.
    if str(options.out).encode(errors="ignore") != os.fsencode(options.out):
        raise ValueError(f"--out {str(options.out)!r}: expected a name in UTF-8")
    values = asdict(options) | {"out": expand(options.out)}
    for name in checkpoint.MAY_MOVE:  # absolute: a run resumes from any working folder
        if values[name] not in ("", "random", "samples"):
            values[name] = str(expand(values[name]).absolute())
    return validated(options_class, values)


def _parse(default: Any, arguments: Sequence[str], description: str | None) -> Any:
    """Return the options of a command line; --help shows one group per base of their class."""
    groups = {}
    for base in reversed(type(default).__bases__):
        values = {field.name: getattr(default, field.name) for field in fields(base)}
        groups[base.__name__.lower()] = base(**values)
    parsed = tyro.cli(
        dict,
        default=groups,
        args=arguments,
        prog="python -m train.xfactor",
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return type(default)(**{k: v for group in parsed.values() for k, v in vars(group).items()})


def validated(options_class: Any, values: dict[str, Any], where: str = "") -> Any:
    """Return the options with these values; ValueError if an annotation excludes one."""
    try:
        return TypeAdapter(options_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, got = str(first["loc"][0]).replace("_", "-"), str(first["input"])[:40]
        raise ValueError(f"{where}--{name} {got}: {first['msg']}") from error


def describe(options: Any, goal: str, target: TwoLevelTarget) -> None:
    """Print what runs and where."""
    device, model = target.mask.device, options.weights or options.model
    path = "Triton kernels" if device.type == "cuda" else "PyTorch path"
    path = "F.log_softmax, F.kl_div" if options.loss == "unfused" else path
    say(
        f"{options.model + ' with random weights' if model == 'random' else model} in "
        f"{options.dtype} on {distributed.device_name(device)}, {distributed.world_size()} "
        f"rank(s), loss: {options.loss} ({path})\n"
        f"{target.size} of {target.vocab_size} tokens are the goal: {goal}"
    )
    if device.type == "cpu" and options.model != "tiny" and model in (options.model, "random"):
        say(
            "No CUDA device found. On a CPU, gpt2-medium takes seconds per step and 7 GiB of "
            "memory; --model tiny takes a minute in all."
        )
    if options.compile:
        say("compiling in the first step: about a minute")


def progress(label: str, done: int, total: int) -> tqdm:
    """Return a bar over the steps of a run, for a terminal; `unpause` it after other work."""
    hidden = None if distributed.is_main() else True  # None: unless it is on a terminal
    bar = tqdm(initial=done, total=total, unit="step", disable=hidden, mininterval=0, miniters=0)
    bar.desc = label  # which a hidden one does not keep
    return bar


def interval(bar: tqdm) -> float:
    """Return the seconds between two updates of a bar, or two lines."""
    return 5.0 if bar.disable else 0.1


def show(bar: tqdm, step: int, measured: Sequence[float], speed: float, evaluating: bool) -> None:
    """Redraw the bar; where it is hidden (a file, a pipe), print a line.

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
    """Write the report and print a summary; if it fails, finished runs stay as they are."""
    try:
        for path in write_report(folders, out):
            say(f"wrote {path}")
        say(summary(folders))
    except Exception as error:  # of any kind: the runs are complete
        say(f"no report: {error}", error=True)
