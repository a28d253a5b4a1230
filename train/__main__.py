"""`python -m train` says which commands there are."""

import sys

sys.exit(
    "train has several commands. The experiment: python -m train.xfactor; the others: "
    "train.report, train.sample, train.walkthrough, train.benchmark, train.pretrain"
)
