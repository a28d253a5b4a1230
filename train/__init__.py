"""The experiment: read `xfactor.py` from top to bottom, then what it calls."""

import os
import signal
import sys
from types import FrameType

# libgomp's threads spin at every barrier, which makes a step 30 times slower on a shared machine.
# libgomp reads this variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# Importing torch takes seconds, and some of its C++ swallows a KeyboardInterrupt. There is nothing
# to save yet, so a command ends at once. train.command takes over the signals later.
if sys.argv[:1] == ["-m"]:  # Python is still looking for the module to run
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
