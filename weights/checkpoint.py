"""GPT-2 weights in safetensors files: checked to the last value when read, whole when written.

The format: 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape,
data_offsets), then the tensors without gaps. The safetensors library checks a header against its
file. The bytes are read here, not by the library, for three reasons: its tensors are views of a
memory map, the official files are laid out so that those views start 2 bytes off a float's
boundary, and touching a map of a file that is being truncated kills the process.

Each tensor is read straight into memory of its own, two tensors at a time. Nothing is ever
unpickled.
"""

import errno
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .layout import MASK, Layout, Shape, WeightsError, check_layout

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "U8": 1}  # the last two: of masks only
FILE_NAME = "model.safetensors"
NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
READERS = 2  # tensors read at a time


class Entry(NamedTuple):
    """One tensor as a header describes it."""

    dtype: str
    shape: Shape
    begin: int  # byte in the file


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by the names stored in it, in the order of their bytes.

    Raises WeightsError where there is no such file, where the header is malformed or does not fit
    the file, and at a dtype that no GPT-2 file holds.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: got no such file, expected a safetensors file")
    try:
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        # Opening checks the header: its JSON, shape x dtype = bytes, and offsets without a gap.
        # So sizes alone give the offsets, and a second parser that might disagree is not needed.
        with safe_open(path, framework="numpy") as tensors:
            entries = {}
            for name in tensors.offset_keys():
                view = tensors.get_slice(name)
                entry = Entry(view.get_dtype(), tuple(view.get_shape()), begin)
                if entry.dtype not in ITEM_BYTES:
                    raise WeightsError(
                        f"{path}: {name[:80]!r}: got {entry.dtype}, expected one of {[*DTYPES]}"
                    )
                begin += math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
                entries[name] = entry
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read as a whole safetensors file: {error}. Fetch or save it again"
        ) from error
    return entries


def parameter_entries(path: Path) -> tuple[dict[str, Entry], Layout]:
    """The parameters of a GPT-2 file by their official names, in the order of their bytes.

    The prefix `transformer.` is stripped and the causal masks are left out; `lm_head.weight` stays,
    last, where it is stored. Raises WeightsError if names, shapes or dtypes are not a GPT-2's.
    """
    entries: dict[str, Entry] = {}
    for stored, entry in read_header(path).items():
        name = stored.removeprefix("transformer.")
        if MASK.fullmatch(name):
            continue
        if name in entries:
            raise WeightsError(f"{path}: {name}: got it twice, with and without 'transformer.'")
        entries[name] = entry
    head = entries.pop("lm_head.weight", None)
    layout = check_layout({name: entry.shape for name, entry in entries.items()}, str(path))
    if head is not None:
        expected = entries["wte.weight"].shape
        if head.shape != expected:
            raise WeightsError(f"{path}: lm_head.weight: got {head.shape}, expected {expected}")
        entries["lm_head.weight"] = head
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise WeightsError(f"{path}: {name}: got {entry.dtype}, expected one of {[*DTYPES]}")
    return entries, layout


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter as (official name, float32 tensor in its own 64-byte aligned memory).

    Raises WeightsError as `parameter_entries` does, and at the first value that is NaN or infinite,
    at a file that ends early, and at an `lm_head.weight` that is not equal to `wte.weight`.
    """
    entries, _ = parameter_entries(path)
    embedding = torch.empty(0)
    try:
        with open(path, "rb") as file, ThreadPoolExecutor(READERS) as readers:
            read = partial(_read_tensor, file.fileno(), path)
            tensors = readers.map(read, entries, entries.values())
            for name, tensor in zip(entries, tensors, strict=True):
                if name == "wte.weight":
                    embedding = tensor
                if name != "lm_head.weight":
                    yield name, tensor
                elif not torch.equal(tensor, embedding):
                    raise WeightsError(
                        f"{path}: lm_head.weight: got values that differ from wte.weight, expected "
                        "GPT-2's tied head, which is equal to it"
                    )
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _read_tensor(descriptor: int, path: Path, name: str, entry: Entry) -> Tensor:
    stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
    got = os.preadv(descriptor, [stored.view(-1).view(torch.uint8).numpy().data], entry.begin)
    if got != stored.nbytes:
        raise WeightsError(f"{path}: {name}: the file ended: got {got} bytes of {stored.nbytes}")
    tensor = stored.float()  # float32 stays where it is
    _check_finite(tensor, f"{path}: {name}")
    return tensor


def _check_finite(tensor: Tensor, source: str) -> None:
    """Raises WeightsError at the first NaN or infinity of a float32 tensor on the CPU."""
    values = tensor.numpy().reshape(-1)
    # One of either always shows in the sum, which costs far less than looking at every value; and
    # NumPy's sum takes one thread, so it does not wait for a second one on a machine that is busy.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):  # else the sum alone overflowed
        raise WeightsError(
            f"{source}: got {values[bad[0]]} at flat index {bad[0]}, expected finite values"
        )


def save_weights(state_dict: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Writes `folder/model.safetensors` and `folder/config.json`, creating the folder.

    `state_dict` holds the parameters under their official names, as float32, float16 or bfloat16,
    on any device; the file keeps the dtype. transformers' GPT2LMHeadModel.from_pretrained(folder)
    reads the result. A file that was there stays whole until the new one is complete on disk.

    Raises WeightsError if a tensor is missing, extra, misshapen, of another dtype or not finite,
    and if the folder cannot be written.
    """
    layout = check_layout({name: tuple(t.shape) for name, t in state_dict.items()}, "state_dict")
    tensors = {}
    for name, tensor in state_dict.items():
        if tensor.dtype not in DTYPES.values():
            allowed = [*DTYPES.values()]
            raise WeightsError(f"state_dict: {name}: got {tensor.dtype}, expected one of {allowed}")
        tensors[name] = tensor.detach().cpu().contiguous()
        _check_finite(tensors[name].float(), f"state_dict: {name}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(layout.config(), indent=2) + "\n")
        with atomic_write(folder / FILE_NAME) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, RuntimeError, SafetensorError) as error:  # the second: tensors share memory
        raise WeightsError(f"cannot write weights to {folder}: {error}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`; what is written to it replaces `path`.

    The replacement is a single rename of a file already on the disk, so a crash leaves the old
    file or the new one, never a part of either, and a link at `path` is replaced, not followed.
    If the body raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a new, private file in its place
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until the content of a file, or the list of files in a folder, is on the disk.

    Where a file system cannot do this for folders, warns once instead.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC or not path.is_dir():
            raise
        text = f"a crash may undo the newest saves: folders cannot be fsynced ({error.strerror})"
        warnings.warn(text, stacklevel=1)
