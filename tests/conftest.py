"""For the whole suite: Triton's interpreter stands in for a missing GPU; settings are put back."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


@pytest.fixture(autouse=True)
def products_are_as_before() -> Iterator[None]:
    """What `train.machine` sets for its process is no other test's business."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
