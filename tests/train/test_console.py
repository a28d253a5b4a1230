"""How a command talks: signals that are ignored, streams that are gone, the bar's estimate."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from train import checkpoint, console, xfactor

ROOT = Path(__file__).parents[2]


def test_a_signal_that_the_command_was_started_to_ignore_is_ignored() -> None:
    """As nohup does with SIGHUP; the other signals are obeyed, and all are put back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.signals() as received:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nobody_needs_to_read_what_is_said(monkeypatch) -> None:
    """A pipe whose reader has gone, as after `| head -1`; and a stream that was closed."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    monkeypatch.setattr(sys, "stderr", None)
    with console.command():
        for _ in range(3):
            console.say("a line")
            console.say("a line", error=True)
    sys.stdout.close()  # flushes what is left


@pytest.mark.parametrize("module", ["xfactor", "sample", "walkthrough", "benchmark", "pretrain"])
def test_the_help_may_be_read_in_part(module: str) -> None:
    """As by `| head -1`: the reader has gone before the first line is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", f"train.{module}", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


def test_the_help_groups_the_options_and_says_every_default(capsys, monkeypatch) -> None:
    """In words where the value says nothing."""
    monkeypatch.setattr(sys, "argv", ["train.xfactor", "--help"])
    with pytest.raises(SystemExit):
        xfactor.main()
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in ("start", "goal", "optimisation", "output"):
        assert f" {group} options " in text.replace("─", " ")
    for default in ("", "''", "None"):
        assert f"(default: {default})" not in text
    assert text.count("(default") + text.count("(repeatable)") >= len(fields(xfactor.Options))


def test_an_error_of_the_system_is_one_line() -> None:
    """Whatever a command was doing."""
    with pytest.raises(SystemExit, match=r"error: .*No such file.*/no/such/file"):  # noqa: SIM117
        with console.command():
            Path("/no/such/file").read_text()


def test_an_error_steers_no_terminal_and_has_one_line() -> None:
    """Whatever is in the path that it quotes."""
    with pytest.raises(SystemExit) as raised, console.command():
        raise ValueError("/a\nb/\x1b[31m: no such folder")
    assert str(raised.value) == r"error: /a\nb/\x1b[31m: no such folder"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path: Path) -> None:
    """In the folder of the runs and in the files that they begin with."""
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--out", "~/runs", "--inputs", "~/text", "--weights", "~", "--tokens", "~/ids"]
    options = console.parse_options(xfactor.Options, arguments, None)
    assert options.out == tmp_path / "runs"
    given = options.inputs, options.weights, options.tokens
    assert given == (str(tmp_path / "text"), str(tmp_path), str(tmp_path / "ids"))


def test_values_in_another_order_are_those_of_the_run_but_for_factors(
    monkeypatch, tmp_path
) -> None:
    """Rates and G are a run each, in the order of the command that made them; a factor belongs to
    the string in its place."""
    saved = xfactor.Options(tilt=(3.0, 5.0), contains=("a", "b"), strength=(1.0, 2.0))
    values = asdict(saved) | {"out": str(tmp_path)}
    monkeypatch.setattr(checkpoint, "read_options", lambda out: values)
    resume = ["--resume", str(tmp_path)]
    options = console.parse_options(xfactor.Options, [*resume, "--tilt", "5", "3"], None)
    assert options.tilt == (3.0, 5.0)
    with pytest.raises(ValueError, match="--strength: got"):
        console.parse_options(xfactor.Options, [*resume, "--strength", "2", "1"], None)


def test_g_is_bounded() -> None:
    """Beyond, float32 no longer tells the logits from each other."""
    for arguments in (["--tilt", "101"], ["--tilt", "3", "--contains", "x", "--strength", "-101"]):
        with pytest.raises(ValueError, match=f"{arguments[-2]} -?101"):
            console.parse_options(xfactor.Options, arguments, None)


def test_a_report_that_fails_leaves_the_runs_finished(monkeypatch, capsys) -> None:
    """Whatever is wrong with it is said in one line."""
    monkeypatch.setattr(console, "write_report", lambda *_: 1 / 0)
    console.report([], Path())
    assert capsys.readouterr().err == "no report: division by zero\n"


def test_the_estimate_of_the_bar_covers_steps_alone(monkeypatch) -> None:
    """A twentieth of a second per step, and a minute for an evaluation after five of ten."""
    terminal, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.progress("lr-0.01", 0, 10) as bar:
        bar._time, bar.start_t, bar.last_print_t = lambda: clock[0], 0.0, 0.0
        for step in range(1, 9):
            clock[0] += 0.05
            console.show(bar, step, (1.0, 0.5), 100.0, evaluating=step == 5)
            if step == 5:
                clock[0] += 60
                bar.unpause()
        assert bar.format_dict["elapsed"] == pytest.approx(0.4)
        assert bar.format_dict["rate"] == pytest.approx(20)
    assert "evaluating" in terminal.getvalue()
