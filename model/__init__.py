"""GPT-2 by hand: `gpt2.py` is the architecture, the first file to read."""

import re
import sys

# Python leaves sys.argv[0] at "-m" while it looks for the module to run.
if sys.argv[:1] == ["-m"] and re.search(rf"-m ?{__name__}(?!\w)", " ".join(sys.orig_argv)):
    sys.exit("model has no commands. To see it at work: python -m train.sample")

from .gpt2 import GPT2, GPT2Config

__all__ = ["GPT2", "GPT2Config"]
