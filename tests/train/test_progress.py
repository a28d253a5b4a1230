"""Whoever waits sees a line every few seconds, across the loops of a command."""

import pytest

from train import command
from train.command import progress, say


def test_a_loop_counts_the_silence_before_it(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """Loops of 4 seconds: the second one speaks in its second second, later ones as late."""
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    say("begins")
    for name in "abc":
        for _ in progress(range(4), name, 4):
            now[0] += 1
    assert capsys.readouterr().err == "b: 2 of 4\nc: 4 of 4\n"
