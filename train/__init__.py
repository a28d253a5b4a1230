"""The experiment: `xfactor.py`, read top to bottom, and what it calls."""

import os
import re
import sys

COMMANDS = "xfactor|report|sample|walkthrough|benchmark|pretrain"
# Python leaves sys.argv[0] at "-m" while it looks for the module to run.
if sys.argv[:1] == ["-m"] and re.search(
    rf"-m ?{__name__}(?!\w|\.({COMMANDS})\b)", " ".join(sys.orig_argv)
):
    sys.exit(f"To run the experiment: python -m train.xfactor; commands of train: {COMMANDS}")

# libgomp's threads spin at every barrier: beside other busy processes that made a step 30 times
# slower. It reads this when torch loads it, so it is set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
