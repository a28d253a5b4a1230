"""GPT-2 weights in and out: safetensors files to plain state dicts, and back.

A state dict holds the parameters under their official names (`h.0.attn.c_attn.weight`; no prefix,
no masks, no `lm_head`), in the official layout: affine weights are (in, out).
"""

import os
from pathlib import Path

from torch import Tensor

from .checkpoint import FILE_NAME, parameter_entries, read_tensors, save_weights
from .layout import Layout, WeightsError

__all__ = ["Layout", "WeightsError", "layout_of", "load_weights", "save_weights"]

TINY = Path(__file__).parent / "tiny"


def load_weights(name_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Loads a GPT-2: "gpt2", "gpt2-medium" or "gpt2-xl" (from the hub's local cache, else by
    download), "tiny" (embedded), a safetensors file, or a folder that holds a model.safetensors.

    Returns float32 tensors on the CPU, whatever floating dtype is stored. Each owns its memory,
    aligned to 64 bytes and never a map of the file, so a model may adopt it as a parameter. Peak
    memory is the returned tensors and at most two more: those in half precision while they are
    converted, or an `lm_head.weight` while it is compared.

    Raises WeightsError: no such file, not a whole safetensors file, names, shapes, dtypes or values
    that are not a GPT-2's, or official weights that cannot be had or whose hash is wrong.
    """
    return dict(read_tensors(_find(name_or_path)))


def layout_of(name_or_path: str | os.PathLike[str]) -> Layout:
    """The sizes of a GPT-2 that `load_weights` would load, without loading or downloading it.

    Raises WeightsError as `load_weights` does, so far as a file's header tells.
    """
    from .official import OFFICIAL

    if name_or_path in OFFICIAL:
        return OFFICIAL[str(name_or_path)].layout
    return parameter_entries(_find(name_or_path))[1]


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    from .official import OFFICIAL, fetch  # not above: it is also run as a module

    name = os.fspath(name_or_path)
    path = fetch(name) if name in OFFICIAL else TINY if name == "tiny" else Path(name).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        expected = ", ".join([*OFFICIAL, "tiny"])
        raise WeightsError(
            f"no weights at {name!r}: got no file {path}, expected {expected}, "
            f"a .safetensors file or a folder that holds a {FILE_NAME}"
        )
    return path
