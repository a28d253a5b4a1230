"""GPT-2 weights in and out: safetensors files to plain state dicts, and back.

A state dict holds the parameters under their official names (`h.0.attn.c_attn.weight`; no prefix,
no masks, no `lm_head`), in the official layout: affine weights are (in, out).
"""

import os

from torch import Tensor

from .checkpoint import read_entries, read_tensors, save_weights
from .layout import Layout, WeightsError

__all__ = ["Layout", "WeightsError", "layout_of", "load_weights", "save_weights"]


def load_weights(name_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a GPT-2: "gpt2", "gpt2-medium" or "gpt2-xl" (from the hub's local cache, else by
    download), "tiny" (embedded), a safetensors file, or a folder with a model.safetensors or its
    shards. Prefixes of transformers, torch.compile, DDP and Lightning are stripped.

    The file may hold float32, float16 or bfloat16. Returns float32 tensors on the CPU, each in its
    own memory, aligned to 64 bytes, so a model can use it as a parameter without copying. Peak
    memory is the returned tensors and at most two more: the largest in half precision while it is
    converted, and an `lm_head.weight` until it is compared.

    Raises WeightsError if the file is missing or not a complete safetensors file; if its names,
    shapes, dtypes, values or config.json are not a GPT-2's; if official weights are not available
    or their hash is wrong.
    """
    from .official import OFFICIAL, read_official  # not above: it is also run as a module

    read = read_official if name_or_path in OFFICIAL else read_tensors
    return dict(read(os.fspath(name_or_path)))


def layout_of(name_or_path: str | os.PathLike[str]) -> Layout:
    """Return the sizes of what `load_weights` would load, without loading or downloading it.

    Raises WeightsError as `load_weights` does, so far as a file's header and config.json tell.
    """
    from .official import OFFICIAL

    if name_or_path in OFFICIAL:
        return OFFICIAL[str(name_or_path)].layout
    return read_entries(name_or_path)[1]
