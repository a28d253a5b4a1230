"""How a command talks: options, signals that are ignored, terminals of any kind, closed pipes."""

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


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of train."""
    words = [sys.executable, "-m", *arguments]
    return subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("environment", [{"COLUMNS": "80"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_the_help_fits_50_lines_on_any_terminal(environment: dict[str, str]) -> None:
    """With every option."""
    done = run("train.xfactor", "--help", TERM="dumb", **environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 50
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1", "--lr", "2"], "--lr is given 2 times"),
        (["--eval-every=1", "--eval_every", "2"], "--eval-every is given 2 times"),
        (["--", "x"], "--: expected an option"),
    ],
)
def test_what_is_not_said_once_is_refused(words, message: str, monkeypatch) -> None:
    """The last value would win in silence."""
    monkeypatch.setattr(sys, "argv", ["xfactor", *words])
    with pytest.raises(ValueError, match=message):
        parse(Options, "", "xfactor")


def test_a_value_may_begin_with_a_dash(monkeypatch, capsys) -> None:
    """After an =, and the command says so."""
    monkeypatch.setattr(sys, "argv", ["xfactor", "--out=-runs", "--tokens=-"])
    assert parse(Options, "", "xfactor").out == Path("-runs")
    monkeypatch.setattr(sys, "argv", ["xfactor", "--out", "-runs"])
    with pytest.raises(SystemExit):
        parse(Options, "", "xfactor")
    assert "--out=-runs" in capsys.readouterr().err


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
    with pytest.raises(command.Stopped), command.signals() as received:
        any(map(signal.raise_signal, (signal.SIGINT, signal.SIGTERM)))
    assert received == [signal.SIGINT]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_raised_where_python_ignores_it_is_not_lost() -> None:
    """In a destructor; the command ends when its body does."""

    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped, command.command():
        Destroyed()
    assert stopped.value.code == 143


def test_a_signal_during_the_imports_is_one_line(tmp_path: Path) -> None:
    """Which take seconds; a module in place of torch sends it."""
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 15); os.read(0, 1)")
    done = run("train.xfactor", PYTHONPATH=str(tmp_path))
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


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_steers_no_terminal_and_has_one_line(error: type[Exception]) -> None:
    """Whatever is in the path that it quotes."""
    with pytest.raises(SystemExit) as raised, command.command():
        raise error("/a\nb/\x1b[31m: no such folder")
    assert str(raised.value) == r"error: /a\nb/\x1b[31m: no such folder"
