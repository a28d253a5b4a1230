"""How a command talks: options, signals, progress, terminals of any kind, closed pipes, errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train import command
from train.command import parse, say
from train.xfactor import Options

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 1 --lr 2", "--lr is given 2 times; give it once"),
        ("--eval-every=1 --eval_every 2", "--eval-every is given 2 times; give it once"),
        ("-- x", "--: expected an option; write a value that begins with - as --tokens=-"),
        ("--out -runs", "Missing value .*; write a value that .* after an =, as in --out=-runs"),
        ("--steps abc", "--steps: expected an integer, got 'abc'"),
        ("--lr fast", "--lr: expected a number, got 'fast'"),
        ("--share x", "--share: expected a number, got 'x'"),
        ("--letter x", "Unrecognized options: --letter, x"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_line(words, message, monkeypatch, capsys):
    """It names the option, on a terminal too; a value may begin with a dash after an =."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["xfactor", *words.split()])
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(Options, "", "xfactor")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "argv", ["xfactor", "--out=-runs", "--tokens=-"])
    assert parse(Options, "", "xfactor").out == Path("-runs")


def test_a_signal_that_the_command_was_started_to_ignore_is_ignored() -> None:
    """As nohup does with SIGHUP; the others are obeyed, and all are put back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in command.SIGNALS]
    try:
        with pytest.raises(command.Stopped), command.signals() as received:
            any(map(signal.raise_signal, (signal.SIGHUP, signal.SIGTERM)))
        assert received == [signal.SIGTERM]
        assert [signal.getsignal(number) for number in command.SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_torchrun_repeats_is_one(monkeypatch) -> None:
    """Ctrl-C in a terminal reaches each rank, and torchrun passes it on to each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command.time, "monotonic", lambda: 0.0)  # at once, on a busy machine too
    with pytest.raises(command.Stopped), command.signals() as received:
        any(map(signal.raise_signal, (signal.SIGINT, signal.SIGTERM)))
    assert received == [signal.SIGINT]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_raised_where_python_ignores_it_is_not_lost() -> None:
    """In a destructor; the command ends when its body does."""

    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match=r"^143$"), command.command():
        Destroyed()


def test_a_signal_during_the_imports_is_one_line(tmp_path: Path) -> None:
    """Which take seconds; a module in place of torch sends it."""
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 15); os.read(0, 1)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "train.xfactor"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_nobody_needs_to_read_what_is_said(monkeypatch) -> None:
    """A pipe whose reader has gone, as after `| head -1`; a stream that was closed; ASCII only."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    with command.command():
        for _ in range(3):
            say("a líne")
            say("a line", error=True)
        assert list(command.progress("abc", "letters", 3)) == ["a", "b", "c"]
    sys.stdout.close()  # flushes what is left


def test_a_loop_counts_the_silence_before_it(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """Loops of 4 seconds: the second one speaks in its second second, later ones as late."""
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    say("begins")
    for name in "abc":
        for _ in command.progress(range(4), name, 4):
            now[0] += 1
    assert capsys.readouterr().err == "b: 2 of 4\nc: 4 of 4\n"


LESS = ". Give a smaller --batch, --dtype bfloat16 or --model gpt2"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("/a\nb/\x1b[31m: no folder"), r"/a\nb/\x1b[31m: no folder"),
        (OSError("no\tfile"), r"no\tfile"),
        (RuntimeError("CUDA out of memory\nSee more"), f"CUDA out of memory{LESS}"),
        (RuntimeError("can't allocate memory\nframe"), f"can't allocate memory{LESS}"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), f"CUBLAS_STATUS_ALLOC_FAILED{LESS}"),
    ],
)
def test_an_error_of_a_user_is_one_line_and_steers_no_terminal(error: Exception, line: str) -> None:
    """Whatever is in the path that it quotes, whatever the allocator says; a fault of the program
    is a traceback."""
    with pytest.raises(SystemExit) as raised, command.command():
        raise error
    assert str(raised.value) == f"error: {line}"
    with pytest.raises(RuntimeError, match="illegal"), command.command():
        raise RuntimeError("an illegal memory access")
