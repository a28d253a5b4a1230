"""Stands in for the CUDA driver where there is none.

After install() Triton binds arguments, specialises and compiles as for an H100, and the launch
executes the PTX on the bytes of the CPU tensors that were passed, in place. What a kernel may touch
is the storage of these tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .machine import launch
from .memory import Counts, Memory, Region
from .parse import Kernel, parse

NUMBERS: dict[str, Any] = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


@dataclass
class Loaded:
    """A loaded kernel, as the handle that Triton passes back at each launch."""

    shared_bytes: int
    kernel: Kernel | None = None  # from _read_ptx, which Triton calls after load_binary


class Utils:
    """The part of a driver that loads binaries and knows the device."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills and the most threads of a program."""
        return None, Loaded(shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those of an H100."""
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


def _read_ptx(_: Any, loaded: Loaded, name: str, files: dict[str, str], hash: str) -> None:
    """Triton's hook after load_binary: `files` are the paths of what the compiler wrote."""
    path = next(path for file, path in files.items() if file.endswith(".ptx"))
    loaded.kernel = parse(Path(path).read_text())


class Launcher:
    """Executes a kernel where a real driver would launch it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, loaded: Loaded, *rest: Any) -> None:
        kernel, arguments = loaded.kernel, rest[4:]  # behind metadata and hooks
        assert kernel is not None
        regions: list[Region] = []
        values: list[np.generic] = []
        for kind, argument in zip(self.types, arguments, strict=True):
            if kind.startswith("*"):
                regions.append(_region(argument))
                values.append(np.uint64(argument.data_ptr()))
            elif kind != "constexpr":
                values.append(NUMBERS[kind](argument))
        values += [np.uint64(0)] * (len(kernel.parameters) - len(values))  # Triton's scratch memory
        named = dict(zip(kernel.parameters, values, strict=True))
        counts = None if _counted is None else Counts()
        launch(kernel, Memory(regions), x, named, loaded.shared_bytes, counts)
        if _counted is not None and counts is not None:
            _counted.append((kernel.name, counts))


class Driver:
    """The part of a driver that Triton calls."""

    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The number of the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


_counted: list[tuple[str, Counts]] | None = None


@contextmanager
def counted() -> Iterator[list[tuple[str, Counts]]]:
    """A list that receives the name and the counts of each launch in the block."""
    global _counted
    _counted = []
    try:
        yield _counted
    finally:
        _counted = None


def _region(tensor: Tensor) -> Region:
    storage = tensor.untyped_storage()
    assert storage.data_ptr() % 16 == 0
    return Region(storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def install() -> None:
    """Make this the driver of Triton, and let the losses take impl="triton" on CPU tensors."""
    driver.set_active(Driver())
    triton.knobs.runtime.kernel_load_end_hook.add(_read_ptx)
    losses: list[Any] = [
        import_module(f"kernels.{name}") for name in ("fused_kl_div", "fused_linear_kl_div")
    ]
    launchers = losses[0].launchers

    def on_any_device(impl: str, device: torch.device, *rest: Any) -> ModuleType:
        """As kernels.fused_kl_div.launchers, which refuses Triton on CPU tensors."""
        return launchers(impl, torch.device("cuda") if "triton" in impl else device, *rest)

    for module in losses:
        module.launchers = on_any_device
