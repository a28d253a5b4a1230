"""`python -m kernels` measures nothing; it names what does."""

import sys

sys.exit(
    f"To measure on this machine, run: python -m {__package__}.benchmark\n"
    f"To compile the kernels without a GPU, run: python -m {__package__}.compile_report"
)
