"""Tests are claims; each folder mirrors one of the code."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as train/__init__.py
