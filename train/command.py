"""Command-line plumbing: options, one-line errors, Ctrl-C, progress."""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO, TextIOWrapper
from types import FrameType
from typing import TypeVar

import tyro
from tqdm import tqdm

from train import ranks
from weights.layout import WeightsError, printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5.0  # seconds without a line of progress, where there is no terminal
last_line = time.monotonic()  # when one was printed
T = TypeVar("T")


class Stopped(BaseException):
    """A signal ended the command; its exit status is 128 + number."""

    def __init__(self, number: int, details: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{details}")
        self.number = number


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command. An error ends it with one line, a signal with 128 + its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # neither closed nor captured
            stream.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    try:
        with signals(hold=0):
            yield
    except BrokenPipeError:  # nobody reads the output any more
        sys.exit(1)
    except WeightsError as error:  # printable already; some have a line per way out
        sys.exit(f"error: {error}" if ranks.is_main() else 1)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {printable(str(error))}" if ranks.is_main() else 1)
    except RuntimeError as error:
        reason, *_ = str(error).splitlines() or [""]  # the rest is about the allocator
        if not any(lack in reason for lack in ("out of memory", "allocate memory", "ALLOC_FAILED")):
            raise
        sys.exit(f"error: {reason}. Give a smaller --batch, --dtype bfloat16 or --model gpt2")
    except Stopped as stopped:
        if ranks.is_main():
            say(str(stopped), error=True)
        sys.exit(128 + stopped.number)
    finally:
        say("", end="")  # flush while an error can still be caught


@contextmanager
def signals(hold: int = 1) -> Iterator[list[int]]:
    """Yield a list that collects the first `hold` signals; the next one raises Stopped."""
    received: list[int] = []
    at = -math.inf

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal at
        before, at = at, time.monotonic()
        if ranks.world_size() > 1 and at - before < 1:  # torchrun repeats the Ctrl-C of a terminal
            return
        received.append(number)
        if len(received) > hold:
            raise Stopped(number)

    # A signal that is ignored, as SIGHUP under nohup, stays ignored.
    obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in obeyed}
    try:
        yield received
        if received:  # held, or raised where Python ignores exceptions, as in a destructor
            raise Stopped(received[-1])
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def parse(options: type[T], description: str | None, prog: str) -> T:
    """Return the options of the command line, a dataclass; raise ValueError if they are bad."""
    arguments = sys.argv[1:]
    given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    given = [word.replace("_", "-") for word in given]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"{name} is given {given.count(name)} times; give it once")
    if "--" in arguments:
        raise ValueError("--: expected an option; write a value that begins with - as --tokens=-")
    flags = (tyro.conf.FlagCreatePairsOff,)
    description = "\n\n".join(str(description).split("\n\n")[:2])  # the help fits a screen
    try:
        with redirect_stderr(StringIO()) as box:
            return tyro.cli(options, prog=prog, description=description, config=flags)
    except SystemExit as end:
        if not end.code:  # of --help
            raise
    plain = re.sub(r"\x1b\[[\d;]*m|[│╮]", "", box.getvalue())  # without colours and sides
    reason = [*re.split("[─-]{9,}", plain), plain][1]  # what stands between the first two rules
    reason = " ".join(reason.split()).rstrip(".")
    if wrong := re.fullmatch(r"Error parsing (--\S+): .*\b(int|float)\b.*: (['\"].*)", reason):
        option, kind, value = wrong.groups()
        reason = f"{option}: expected {'an integer' if kind == 'int' else 'a number'}, got {value}"
    for value in (word for word in arguments if word.startswith("-") and word[:2] != "--"):
        reason += f"; write a value that begins with - after an =, as in --out={value}"
    raise ValueError(reason)


def expect(condition: bool, option: str, value: object, expected: str) -> None:
    """Raise ValueError unless the condition on an option's value holds."""
    if not condition:
        raise ValueError(f"--{option} {value}: expected {expected}")


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print; ignore a closed pipe (`| head -1`)."""
    global last_line
    last_line = time.monotonic()
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:  # and drop what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield the items and show how many are done: a bar on a terminal, else a line now and then."""
    if sys.stderr and sys.stderr.isatty():
        yield from tqdm(items, label, total, leave=False)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last_line > PATIENCE:  # of this loop or of what came before it
            say(f"{label}: {done} of {total}", error=True)
