"""Write files in the layout of OpenAI's GPT-2 files on the hub, with random content."""

import json
import math
import os
from collections.abc import Iterator

import numpy as np

SMALL = {"n_layer": 2, "n_embd": 128, "vocab_size": 301, "n_positions": 24}


def stored_shapes(n_layer: int, n_embd: int, vocab_size: int, n_positions: int) -> dict:
    """Stored name -> shape, including masks, in the order of the file: sorted by name."""
    c, p = n_embd, n_positions
    shapes = {"wte.weight": [vocab_size, c], "wpe.weight": [p, c]}
    shapes |= {"ln_f.weight": [c], "ln_f.bias": [c]}
    for n in range(n_layer):
        for ln in "ln_1", "ln_2":
            shapes |= {f"h.{n}.{ln}.weight": [c], f"h.{n}.{ln}.bias": [c]}
        shapes[f"h.{n}.attn.bias"] = [1, 1, p, p]
        affine = {"attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c)}
        affine |= {"mlp.c_fc": (c, 4 * c), "mlp.c_proj": (4 * c, c)}
        for name, (n_in, n_out) in affine.items():
            shapes |= {f"h.{n}.{name}.weight": [n_in, n_out], f"h.{n}.{name}.bias": [n_out]}
    return dict(sorted(shapes.items()))


def header_of(shapes: dict) -> bytes:
    """Return the header as in the official files: compact JSON without padding.

    For gpt2-medium it has the official 28,986 bytes, so every tensor starts 2 bytes off alignment.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return json.dumps(header, separators=(",", ":")).encode()


def write_official(
    path: str | os.PathLike[str],
    *,
    n_layer: int = 24,
    n_embd: int = 1024,
    vocab_size: int = 50257,
    n_positions: int = 1024,
    seed: int = 0,
) -> None:
    """Write a float32 GPT-2 as an official file; the defaults are the sizes of gpt2-medium.

    Masks are causal, gains are near 1, everything else is uniform with standard deviation 0.02.
    """
    shapes = stored_shapes(n_layer, n_embd, vocab_size, n_positions)
    header = header_of(shapes)
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            file.writelines(_content(name, shape, rng))


def _content(name: str, shape: list[int], rng: np.random.Generator) -> Iterator[memoryview]:
    if name.endswith(".attn.bias"):
        yield np.tri(shape[-1], dtype=np.float32).data
        return
    gain = ".ln_" in f".{name}" and name.endswith(".weight")
    for row in range(0, shape[0], 1024):  # in parts, so that writing takes little memory
        values = rng.random((min(1024, shape[0] - row), *shape[1:]), dtype=np.float32)
        values -= 0.5
        values *= 0.02 * math.sqrt(12)
        yield (values + np.float32(gain)).data


def read_tensorwise(path: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every stored float tensor as float32, independently of the code under test."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            body = file.read(end - begin)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (np.frombuffer(body, "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(body, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
            yield name, values.astype(np.float32).reshape(entry["shape"])  # the one copy


def parameters_of(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the parameters of `read_tensorwise` by name: no masks."""
    return {k: v for k, v in read_tensorwise(path) if not k.endswith(".attn.bias")}


def assert_equal(state_dict: dict, arrays: dict) -> None:
    """Check for the same names, each a float32 tensor with these values."""
    assert state_dict.keys() == arrays.keys()
    for name, tensor in state_dict.items():
        assert tensor.numpy().dtype == np.float32
        np.testing.assert_array_equal(tensor.numpy(), arrays[name], err_msg=name)
