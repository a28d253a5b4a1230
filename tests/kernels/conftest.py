"""The Triton kernels run without a GPU: compiled, unless the interpreter is asked for. Memory that
nobody has written is NaN."""

import pytest
import torch

from tests.kernels.kl_cases import COMPILED_ON_CPU

if COMPILED_ON_CPU:
    from tests.kernels.ptx import driver

    driver.install()


@pytest.fixture(autouse=True)
def unwritten_numbers_are_nan(monkeypatch):
    """What new_empty and its like return is filled, so that a test fails on every machine where
    code reads what it has not written."""

    def poisoned(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            if type(result) is torch.Tensor and result.is_floating_point() and not result.is_meta:
                result.data.fill_(float("nan"))
            return result

        call.__name__ = function.__name__
        return call

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
