"""GPT-2 weights in safetensors files: every value checked when read, complete files when written.

The format: 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape,
data_offsets), then the tensors without gaps. The safetensors library checks a header against its
file. The tensors are read here, not by the library, for two reasons. Its tensors are views of a
memory map, which in the official files start 2 bytes off a float's boundary; and touching the map
of a file that is being truncated kills the process. Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .layout import (
    FILE_NAME,
    HEAD,
    MASK,
    Layout,
    WeightsError,
    check_config,
    check_layout,
    find_files,
    official_name,
)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MASK_DTYPES = DTYPES | {"BOOL": torch.bool, "U8": torch.uint8}
OTHER_FILES = {  # how a file that is not safetensors begins: what it is and what to do
    rb"\s*version https://git-lfs": "a Git LFS pointer, not the file itself. Run git lfs pull",
    rb"(?i)\s*<(!doctype|html)": (
        "an HTML page, not the file itself. Download from a link with /resolve/"
    ),
    rb"(?s)PK\x03\x04|\x80[\x02-\x05](?!.{6}{)": (  # with the brace: a damaged header
        "a pickle, not safetensors. Rename it to pytorch_model.bin and load that; the error then "
        "shows the command that converts it"
    ),
    rb"GGUF": "a GGUF file, not safetensors. Download the model's .safetensors file",
    rb"\x1f\x8b": "compressed by gzip. Decompress it",
    rb"\s*[{\[]": "JSON, not safetensors. Download the model's .safetensors file",
}
MOST_TENSORS = 20_000  # more than 1,000 blocks
NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}


class Entry(NamedTuple):
    """One stored tensor."""

    path: Path
    begin: int  # its first byte in that file
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> Iterator[tuple[str, Entry]]:
    """Yield the tensors of a safetensors file in the order of their bytes, prefixes stripped."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        # Opening checks the header: its JSON, shape x dtype = bytes, and offsets without a gap.
        # So sizes alone give the offsets, without a second parser that might disagree.
        with safe_open(path, framework="numpy") as tensors:
            names = tensors.offset_keys()
            begin = 8 + int.from_bytes(start[:8], "little")
            for stored in names:
                name, view = official_name(stored), tensors.get_slice(stored)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                allowed = MASK_DTYPES if MASK.fullmatch(name) else DTYPES
                if dtype not in allowed:
                    raise WeightsError(
                        f"{path}: {name[:80]!r}: got {dtype}, expected one of {[*allowed]}; "
                        "convert it"
                    )
                yield name, Entry(path, begin, dtype, shape)
                begin += math.prod(shape) * allowed[dtype].itemsize
    except (OSError, SafetensorError) as error:
        for first_bytes, kind in OTHER_FILES.items():
            if isinstance(error, SafetensorError) and re.match(first_bytes, start):
                raise WeightsError(f"{path} is {kind}") from error
        raise WeightsError(
            f"{path} cannot be read as a complete safetensors file: {error!s:.200}. "
            "Remove it and download or save it again"
        ) from error


def read_entries(name_or_path: str | os.PathLike[str]) -> tuple[dict[str, Entry], Layout]:
    """Return every stored tensor, masks and head too, by its official name; and the sizes."""
    files = find_files(name_or_path)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file):
            if name in entries:
                raise WeightsError(f"{file}: {name[:80]!r}: got it twice, with different prefixes")
            if len(entries) == MOST_TENSORS:
                raise WeightsError(f"{file} is not a GPT-2: got more than {MOST_TENSORS:,} tensors")
            entries[name] = entry
    shapes = {name: e.shape for name, e in entries.items() if not MASK.fullmatch(name)}
    head = shapes.pop(HEAD, None)
    layout = check_layout(shapes, str(name_or_path))
    if head not in (None, shapes["wte.weight"]):
        raise WeightsError(f"{files[0]}: {HEAD}: got {head}, expected {shapes['wte.weight']}")
    check_config(files[0].with_name("config.json"), layout)
    return entries, layout


def read_tensors(
    name_or_path: str | os.PathLike[str], digest: "hashlib._Hash | None" = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter as (official name, float32 tensor in its own 64-byte aligned memory).

    A `digest` is updated with every byte of the file as it is read, so it is the hash of what was
    loaded. A head that differs from `wte.weight` is refused after the last tensor.
    """
    entries, _ = read_entries(name_or_path)
    parameters = [(name, e) for name, e in entries.items() if not MASK.fullmatch(name)]
    tied: dict[str, Tensor] = {}
    try:
        for part, group in groupby(parameters, key=lambda item: item[1].path):
            with open(part, "rb") as file:
                for name, entry in group:
                    stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
                    buffer = stored.view(-1).view(torch.uint8).numpy().data
                    if digest is None:
                        file.seek(entry.begin)
                    else:  # what lies before it: the header or a mask
                        digest.update(file.read(entry.begin - file.tell()))
                    if file.readinto(buffer) != len(buffer):
                        raise WeightsError(f"{part}: {name}: the file ended early")
                    if digest is not None:
                        digest.update(buffer)
                    tensor = stored.float()  # float32 stays as it is
                    _check_finite(tensor, f"{part}: {name}")
                    if name in ("wte.weight", HEAD):
                        tied[name] = tensor
                    if name != HEAD:
                        yield name, tensor
                if digest is not None:
                    digest.update(file.read())
    except OSError as error:
        raise WeightsError(f"cannot read {name_or_path}: {error}") from error
    if HEAD in tied:
        _check_tied(tied[HEAD], tied["wte.weight"], str(name_or_path))


def _check_tied(head: Tensor, wte: Tensor, source: str) -> None:
    if head.dtype != wte.dtype or not torch.equal(head, wte):
        got = "got values that differ from wte.weight, expected GPT-2's tied head"
        raise WeightsError(f"{source}: {HEAD}: {got}")


def _check_finite(tensor: Tensor, source: str) -> None:
    """Raise WeightsError at the first NaN or infinity."""
    # Either always shows in the sum, which costs far less than a look at every value.
    if not tensor.sum().isfinite():
        bad = tensor.flatten().isfinite().logical_not().nonzero()
        if len(bad):  # else the sum alone overflowed
            value, at = tensor.flatten()[bad[0]].item(), bad[0].item()
            raise WeightsError(f"{source}: got {value} at flat index {at}, expected finite values")


def _official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters and head by official name, without masks."""
    named: dict[str, Tensor] = {}
    for stored, tensor in state_dict.items():
        name, source = official_name(stored), f"state_dict: {stored[:80]!r}"
        if not isinstance(tensor, Tensor):
            got = f"got {type(tensor).__name__}, expected a tensor"
            raise WeightsError(f"{source}: {got}; if it holds the weights, pass only that")
        if tensor.is_meta:
            raise WeightsError(f"{source}: got a meta tensor, expected one with values")
        if name in named:
            raise WeightsError(f"{source}: got it twice, with different prefixes")
        if not MASK.fullmatch(name):
            named[name] = tensor
    return named


def save_weights(state_dict: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors and config.json to `folder`, which is created if need be.

    `state_dict` holds the parameters as float32, float16 or bfloat16, on any device; the file
    keeps the dtype. Prefixes, masks and a tied head are stripped as by `load_weights`.
    transformers' GPT2LMHeadModel.from_pretrained(folder) reads the result. An existing file stays
    complete until the new one is on the disk.

    Raises WeightsError if a tensor is missing, unknown, misshapen, of another dtype, on the meta
    device or not finite, or if the folder cannot be written.
    """
    named = _official(state_dict)
    head = named.pop(HEAD, None)
    layout = check_layout({name: tuple(t.shape) for name, t in named.items()}, "state_dict")
    tensors = {}
    for name, tensor in named.items():
        if tensor.dtype not in (allowed := [*DTYPES.values()]):
            raise WeightsError(f"state_dict: {name}: got {tensor.dtype}, expected one of {allowed}")
        tensors[name] = tensor.detach().cpu().contiguous()
        _check_finite(tensors[name].float(), f"state_dict: {name}")
    if head is not None:
        _check_tied(head.detach().cpu(), tensors["wte.weight"], "state_dict")
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(layout.config(), indent=2) + "\n")
        with atomic_write(folder / FILE_NAME) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"cannot write weights to {folder}: {error}") from error


@contextmanager
def atomic_write(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary file next to `path`; what is written to it replaces `path`.

    The replacement is a single rename of a file that is on the disk already, so a crash leaves the
    old file or the new one, never a part of either. A link at `path` is replaced, not followed. If
    the body raises, the temporary file is removed and `path` stays as it was. A killed process
    leaves it behind, in `staging` if that is given: a folder on the same file system.
    """
    temporary = (staging or path.parent) / f".{path.name}.{secrets.token_hex(8)}.tmp"
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        with suppress(OSError):  # some mounted drives have no modes
            temporary.chmod(mode)  # safetensors puts a new, private file in its place
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it has replaced `path`, or an earlier error goes on
            temporary.unlink()
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the list of files in a folder, is on the disk."""
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
