"""x @ W for a few rows on every core of a CPU: what a step of generation consists of.

One token multiplies one row by every weight of the model, so it reads them all, 1.4 GB in
gpt2-medium: memory bandwidth is what counts. The BLAS under F.linear takes one core for one row: on
two Zen 4 cores that read 35 GB/s its products read 20. Cut along the rows in which it is stored
into one slice a core, a weight is a batch of smaller matrices, which the cores share: 30 GB/s.

    weight stored (in, out), GPT-2's affine maps:  x W = sum over slices s of x_s W_s
    weight stored (out, in), the LM head:          x W^T = the slices' x W_s^T side by side

The first adds in another order than F.linear does, so last digits differ.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAX_ROWS = 16  # 1.7 times as fast as F.linear with 1 row, 1.2 times with 16; more were not measured


def few_row_products(device: torch.device) -> AbstractContextManager[object]:
    """A context in which F.linear of up to MAX_ROWS rows takes every core of a CPU.

    A context, so that the architecture need not know: what multiplies is not what it says. It does
    nothing on CUDA, nor at a float32 precision that lets oneDNN multiply, which takes every core.
    """
    by_blas = torch.get_float32_matmul_precision() == "highest"
    return _FewRows() if device.type == "cpu" and by_blas else nullcontext()


class _FewRows(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and math.prod(args[0].shape[:-1]) <= MAX_ROWS:
            return linear(*args)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in) times the transpose of weight (out, in), plus bias: (..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    (M, n_in), n_out = rows.shape, len(weight)
    if weight.is_contiguous():
        n = torch.get_num_threads()
        whole = n_out // n * n  # 50,257 is odd: the last outputs may not fill a slice
        # bmm, not @, which would see the one matrix that the slices came from
        slices = torch.bmm(weight[:whole].view(n, -1, n_in), rows.T.expand(n, -1, -1))
        y = torch.cat((slices.flatten(0, 1), weight[whole:] @ rows.T)).T  # (M, out)
    else:
        n = math.gcd(n_in, torch.get_num_threads())
        x_slices = rows.view(M, n, -1).transpose(0, 1)  # (n, M, in / n)
        y = torch.bmm(x_slices, weight.T.unflatten(0, (n, -1))).sum(0)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], n_out)
