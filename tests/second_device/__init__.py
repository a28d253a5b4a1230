"""A second device without a GPU: tensors on "cuda:0" whose values the CPU computes.

    with second_device() as gpu:         # torch.cuda.is_available() is True in here
        train_step(model.to("cuda"))
        assert not gpu.waits()

Operands on two devices are refused as CUDA refuses them. Waits for the device, copies and operators
that would start a kernel are counted. Triton kernels are compiled for an H100, and their PTX is
executed (tests/kernels/ptx). Files written by torch.save say "cuda:0". Values are the CPU's, bit
for bit, save those of Triton kernels: a run here must equal a run there.

It cannot show a GPU's rounding, speed, memory, streams and graphs, host memory that is read before
a non_blocking copy has arrived, or which kernels cuBLAS and the attention take. Autocast converts
what it converts on a CPU, and CPU tensors too. torch.compile, DistributedDataParallel, torch.load
to the device and functions of C++ that make a tensor beside their arguments, as F.one_hot does, do
not run on it. tests/test_second_device.py has its rules, and asks them of a real GPU too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is patched: it makes tables of torch's functions
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .tensor import (
    GENERATORS,
    GPU,
    PINNED,
    RECORD,
    SAVED,
    DeviceTensor,
    Record,
    SecondDevice,
    is_pinned,
    pinned,
)


@contextmanager
def second_device() -> Iterator[Record]:
    """Be a machine with one GPU; yield the record of what happens on it, cleared."""
    RECORD.clear()
    if torch.cuda._is_compiled() and torch._C._cuda_getDeviceCount():
        torch.cuda.init()  # C++ asks for it once, and would take what stands for it below
    with ExitStack() as stack:
        for known in (PINNED, GENERATORS, SAVED):
            stack.callback(known.clear)
        for owner, names in _replacements().items():
            stack.enter_context(mock.patch.multiple(owner, **names))
        if find_spec("triton"):
            stack.enter_context(_triton())
        stack.enter_context(SecondDevice())
        yield RECORD


def _replacements() -> dict[Any, dict[str, Any]]:
    """What stands for torch's own in here, by the object that has it."""
    to = torch.Tensor.to
    return {
        torch: {
            "Generator": Generator,
            "autocast": Autocast,
            "is_autocast_enabled": _of_cpu(torch.is_autocast_enabled),
            "get_autocast_dtype": _of_cpu(torch.get_autocast_dtype),
            "tensor": _tensor(torch.tensor),
        },
        torch.Tensor: {"to": lambda x, *args, **options: _move(to, x, *args, **options)},
        torch.nn.functional: {
            "scaled_dot_product_attention": _adopting(F.scaled_dot_product_attention)
        },
        # Module.to keeps a parameter's identity, though its class changes.
        torch.__future__: {"_swap_module_params_on_conversion": True},
        # None as in a CPU build: a CUDA build without a GPU would ask the driver.
        torch.accelerator: {"current_accelerator": lambda check_available=False: None},
        torch.serialization: {"location_tag": _location(torch.serialization.location_tag)},
        torch.cuda: _cuda(),
    }


def _cuda() -> dict[str, Any]:
    """torch.cuda, as one GPU has it."""
    zero = (
        "_exchange_device", "_lazy_init", "_maybe_exchange_device", "_sleep", "current_device",
        "empty_cache", "manual_seed", "manual_seed_all", "max_memory_allocated", "memory_allocated",
        "reset_peak_memory_stats", "set_device",
    )  # fmt: skip
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 1.0)
    return {
        **dict.fromkeys(zero, lambda *_, **__: 0),
        "Event": lambda enable_timing: event,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device: "second device",
        "synchronize": lambda device: RECORD.add_wait("synchronize"),
    }


def _move(to: Any, x: Tensor, *args: Any, copy: bool = False, **options: Any) -> Tensor:
    """Tensor.to: convert where x is, then move."""
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **options)
    on_gpu = isinstance(x, DeviceTensor)
    if device is None or (device.type == "cuda") == on_gpu:
        device = None if on_gpu else device
        return to(x, device, dtype, non_blocking, copy, memory_format=memory_format)
    if dtype is not None:
        x = to(x, dtype)
    if not on_gpu:
        RECORD.add_copy("device", waits=not (non_blocking and is_pinned(x)))
        return Copy.apply(x)
    RECORD.add_copy("host", waits=not non_blocking)
    host = Copy.apply(x)
    return to(pinned(host) if non_blocking else host, device)  # pinned, as CUDA has it


class Copy(torch.autograd.Function):
    """A tensor on the other device. It has no backward, so a gradient that crosses is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.inner.clone() if isinstance(x, DeviceTensor) else DeviceTensor(x.clone())


def _tensor(make: Any) -> Any:
    """torch.tensor: C++ asks for the device's own memory here, not for an operator."""

    def call(data: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        return make(data, **options).to(device)

    return call


def _adopting(function: Any) -> Any:
    """function(x, ...) in C++, which makes tensors where it believes that x is."""

    def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
        with mock.patch.object(SecondDevice, "adopts", x.is_cuda):
            return function(x, *args, **options)

    return call


class Generator(torch.Generator):
    """Draws the CPU's numbers for the device it was made for, and for no other."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = GPU if torch.device(device).type == "cuda" else torch.device(device)
        keep = GENERATORS.add if self._device == GPU else GENERATORS.discard
        keep(self._cdata)  # an operator gets another Python object for it

    device = property(lambda self: self._device)


class Autocast(torch.autocast):
    """Autocast for either device is the CPU's."""

    def __init__(self, device_type: str, dtype: Any = None, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, dtype, *args, **options)


def _of_cpu(query: Any) -> Any:
    return lambda device="cuda": query("cpu" if device == "cuda" else device)


def _location(location: Any) -> Any:
    """The name of a storage's device, as torch.save writes it."""
    return lambda x: str(GPU) if StorageWeakRef(x) in SAVED else location(x)


@contextmanager
def _triton() -> Iterator[None]:
    """Triton finds an H100; its kernels' PTX is executed on the tensors inside."""
    import triton
    from triton.runtime.driver import driver

    from tests.kernels.ptx.driver import Driver, _read_ptx

    class Launcher(Driver.launcher_cls):
        """Takes tensors of the device alone, and records each launch."""

        def __call__(self, *args: Any) -> None:
            if any(isinstance(x, Tensor) and not x.is_cuda for x in args):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            super().__call__(*args)
            RECORD.add_launch("triton")

    class Counting(Driver):
        """Has a number of its own, as Triton keeps the loaded kernels of each device."""

        launcher_cls = Launcher

        def get_current_device(self) -> int:
            return -1

    hook = triton.knobs.runtime.kernel_load_end_hook
    with (
        mock.patch.object(hook, "calls", [*{*hook.calls, _read_ptx}]),
        mock.patch.object(driver, "_active", Counting()),
    ):
        yield
