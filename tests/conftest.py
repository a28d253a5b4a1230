"""One rule for the whole suite: where there is no GPU, Triton's interpreter stands in for it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
