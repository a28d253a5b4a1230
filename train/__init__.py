"""The experiment: `xfactor.py`, read top to bottom, and what it calls."""

import os

# libgomp's threads spin at every barrier: beside other busy processes that made a step 30 times
# slower. It reads this when torch loads it, so it is set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
