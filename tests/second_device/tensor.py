"""Tensors of the second device; what its operators refuse, wait for and launch; a record of it.

C++ takes a DeviceTensor for a CPU tensor, so autograd, autocast and fused optimizers work. Two
things follow. Methods that move a tensor are overridden, because C++ would not see a difference
between the devices. And every other operator passes through SecondDevice, which checks it by CUDA's
rules and runs it on the CPU tensors inside.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PINNED: set[StorageWeakRef] = set()  # host memory from which a copy need not wait
GENERATORS: set[int] = set()  # the addresses of those that draw for the device
SAVED: set[StorageWeakRef] = set()  # storages to be written as the device's

# Operators of which the host needs a value, or the number of results.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside the pointwise operators, these take a zero-dimensional tensor of the CPU.
TAKE_A_NUMBER = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
# Neither views nor kernels: they allocate, or rename what is there.
NO_KERNEL = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.detach, aten.lift_fresh, aten._unsafe_view, aten._fused_sdp_choice,
    aten._local_scalar_dense,
}  # fmt: skip
# CUDA alone has these: products of 16-bit matrices that return their float32 sums.
CUDA_ONLY: dict[Any, Callable[..., Tensor]] = {
    aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
    aten.mm.dtype_out: lambda a, b, dtype, out: torch.mm(a.to(dtype), b.to(dtype), out=out),
    aten.addmm.dtype_out: lambda c, a, b, dtype, out: torch.addmm(
        c, a.to(dtype), b.to(dtype), out=out
    ),
}


class Record:
    """Counts since it was made or cleared.

    waits     the host needs a result: {"item  train/run.py:41  loss.item()": 1}
    copies    between host and device, whether the host waits or not, in the same form
    launches  operators and Triton kernels that a GPU would have to start: {"aten.addmm": 96}
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self._counts = {what: Counter[str]() for what in ("waits", "copies", "launches")}

    def waits(self) -> Counter[str]:
        return self._counts["waits"]

    def copies(self) -> Counter[str]:
        return self._counts["copies"]

    def launches(self) -> Counter[str]:
        return self._counts["launches"]

    def add_wait(self, why: str) -> None:
        """Count a wait at the line of this project that runs."""
        self._counts["waits"][f"{why}  {current_line()}"] += 1

    def add_copy(self, where: str, waits: bool) -> None:
        """Count a copy to the "host" or to the "device" at that line, and a wait if it is one."""
        self._counts["copies"][f"to the {where}  {current_line()}"] += 1
        if waits:
            self.add_wait(f"copy to the {where}")

    def add_launch(self, operator: str) -> None:
        """Count an operator that starts a kernel."""
        self._counts["launches"][operator] += 1


def current_line() -> str:
    """Return "file:line  code" of the innermost frame in the repository, but not in this folder."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent != HERE and "site-packages" not in path.parts:
            code = linecache.getline(str(path), frame.f_lineno).strip()
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}  {code}"
        frame = frame.f_back
    return "outside the repository"


RECORD = Record()


class DeviceTensor(torch.Tensor):
    """Says that it is on the device; `inner` has the values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu",
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with SecondDevice():  # not reached while one is active
            return func(*args, **(kwargs or {}))

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        RECORD.add_wait("tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        RECORD.add_copy("host", waits=True)
        SAVED.add(StorageWeakRef(self.inner.untyped_storage()))
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {GPU}"


class SecondDevice(TorchDispatchMode):
    """Runs operators that have a DeviceTensor among their arguments, or make one."""

    adopts = False  # what C++ makes "on the CPU" is for operands on the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        ours = [x for x in leaves if isinstance(x, DeviceTensor)]
        device = kwargs.get("device")
        makes = device is not None and (device.type == "cuda" or self.adopts)
        if not ours and not makes:
            return _on_the_host(func, args, kwargs)
        if body := OPDEFS.get(func._schema.name):  # an operator of ours: what is inside counts
            with self:
                return body._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # reached within an operator of ours, and in inference mode
                return func.decompose(*args, **kwargs)
        _refuse(func, args, leaves)
        _count(func, args)
        if "device" in kwargs:
            kwargs = kwargs | {"device": CPU}
        inner_args, inner_kwargs = tree_map_only(DeviceTensor, lambda x: x.inner, (args, kwargs))
        result = CUDA_ONLY.get(func, func)(*inner_args, **inner_kwargs)
        if func is aten.copy_.default and _is_host(args[0]):
            return args[0]
        known = {id(x.inner): x for x in ours}  # in place: the same object
        return tree_map_only(
            Tensor, lambda x: known[id(x)] if id(x) in known else DeviceTensor(x), result
        )


def _is_host(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, DeviceTensor)


def _on_the_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on CPU tensors alone: pinned memory works here without CUDA."""
    packet = func.overloadpacket
    if packet is aten.is_pinned:
        return is_pinned(args[0])
    if packet is aten._pin_memory:
        return pinned(args[0].clone())
    _refuse_generator_of("cuda", (args, kwargs))
    return func(*args, **kwargs)


def pinned(x: Tensor) -> Tensor:
    """Take the memory of a CPU tensor for pinned."""
    PINNED.add(StorageWeakRef(x.untyped_storage()))
    return x


def is_pinned(x: Tensor) -> bool:
    """Return whether a CPU tensor lies in memory that was pinned on the second device."""
    return StorageWeakRef(x.untyped_storage()) in PINNED


def _refuse_generator_of(device: str, arguments: Any) -> None:
    for x in tree_leaves(arguments):
        if isinstance(x, torch._C.Generator) and (x._cdata in GENERATORS) == (device == "cuda"):
            raise RuntimeError(f"Expected a generator of another device type but found '{device}'")


def _refuse(func: Any, args: Any, leaves: list[Any]) -> None:
    """Raise as CUDA would for operands on two devices and for a generator of the other one."""
    _refuse_generator_of("cpu", leaves)
    packet = func.overloadpacket
    if packet in (aten.copy_, aten._to_copy):
        return
    takes_a_number = torch.Tag.pointwise in func.tags or packet in TAKE_A_NUMBER | INDEXING
    allowed = set()
    if packet in INDEXING and not _is_host(args[0]):
        allowed = {id(x) for x in args[1]}  # a CPU index
    for x in leaves:
        if _is_host(x) and id(x) not in allowed and (x.dim() or not takes_a_number):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )


def _count(func: Any, args: Any) -> None:
    """Record the wait, the copy or the launch that this operator is."""
    packet = func.overloadpacket
    if packet is aten.copy_ and _is_host(args[0]) != _is_host(args[1]):
        host, where = (args[0], "host") if _is_host(args[0]) else (args[1], "device")
        non_blocking = args[2:] == (True,)
        RECORD.add_copy(where, waits=not (non_blocking and is_pinned(host)))
        return
    if packet in INDEXING and any(_is_host(x) for x in args[1]):
        RECORD.add_copy("device", waits=True)
    if packet in WAITING or (packet in INDEXING and _selects_by_mask(args)):
        RECORD.add_wait({"_local_scalar_dense": "item"}.get(packet.__name__, packet.__name__))
    if packet not in NO_KERNEL and not func.is_view:
        RECORD.add_launch(str(packet))


def _selects_by_mask(args: Any) -> bool:
    """Whether the positions are to be counted first; a number is filled in without."""
    masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)
