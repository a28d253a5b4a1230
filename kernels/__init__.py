"""Fused log-softmax + KL divergence over a large vocabulary. Importing this needs no Triton."""

import re
import sys

# Python leaves sys.argv[0] at "-m" while it looks for the module to run.
if sys.argv[:1] == ["-m"] and re.search(
    rf"-m ?{__name__}(?!\w|\.(benchmark|compile_report)\b)", " ".join(sys.orig_argv)
):
    sys.exit(f"To measure: python -m {__name__}.benchmark, or compile_report without a GPU")

from .fused_kl_div import fused_kl_div
from .fused_linear_kl_div import fused_linear_kl_div
from .target import TeacherTarget, TwoLevelTarget

__all__ = ["TeacherTarget", "TwoLevelTarget", "fused_kl_div", "fused_linear_kl_div"]
