"""Write files in the layout of OpenAI's GPT-2 files on the hub, with random content."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from weights import Layout

SMALL = Layout(n_layer=2, n_embd=128, vocab_size=301, n_positions=24)


def stored_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape, including masks, in the order of the file: sorted by name."""
    P = layout.n_positions
    masks = {f"h.{n}.attn.bias": (1, 1, P, P) for n in range(layout.n_layer)}
    return dict(sorted((layout.shapes() | masks).items()))


def header_of(shapes: dict) -> bytes:
    """Return the header as in the official files: compact JSON without padding."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return json.dumps(header, separators=(",", ":")).encode()


def join(header: bytes, body: bytes) -> bytes:
    """Return a safetensors file's bytes."""
    return len(header).to_bytes(8, "little") + header + body


def split(file: bytes) -> tuple[bytes, bytes]:
    """Return the header and the body of a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    return file[8:start], file[start:]


def write_official(path: Path, layout: Layout) -> dict[str, Tensor]:
    """Write a float32 GPT-2 as an official file and return its parameters: no masks."""
    shapes, generator = stored_shapes(layout), torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    body = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(join(header_of(shapes), body))
    return {k: v for k, v in tensors.items() if not k.endswith(".attn.bias")}


def assert_equal(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for the same names, each a float32 tensor with these values."""
    assert state_dict.keys() == expected.keys()
    for name, tensor in state_dict.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
