"""A run that is asked to stop: it finishes its step, saves, and says how to go on."""

import signal
from types import FrameType


class Stopped(Exception):  # noqa: N818 - an end, not an error
    """A signal was obeyed: the step was finished and saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, saved")
        self.signal = number


class StopSignals:
    """Within this context, SIGINT and SIGTERM ask for a stop; the second one stops at once.

    One that nobody has obeyed when the context is left is passed on then.
    """

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is not None and kind is not Stopped:
            signal.raise_signal(self.received)
