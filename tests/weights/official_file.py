"""Write files in the layout of OpenAI's GPT-2 files on the hub, with random content."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from weights import Layout

SMALL = Layout(n_layer=2, n_embd=128, vocab_size=301, n_positions=24)


def join(header: bytes, body: bytes) -> bytes:
    """Return a safetensors file's bytes."""
    return len(header).to_bytes(8, "little") + header + body


def split(file: bytes) -> tuple[bytes, bytes]:
    """Return the header and the body of a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    return file[8:start], file[start:]


def write_official(path: Path) -> dict[str, Tensor]:
    """Write a small GPT-2 as an official file and return its parameters.

    As there, there are masks too, and the header is not padded, so tensors are not aligned.
    """
    P, generator = SMALL.n_positions, torch.Generator().manual_seed(0)
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, P, P).tril() for n in range(SMALL.n_layer)}
    shapes = SMALL.shapes().items()
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    header, body = split(save(parameters | masks, metadata={"format": "pt"}))
    path.write_bytes(join(header.rstrip(), body))
    return parameters


def assert_equal(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for the same names, each a float32 tensor with these values."""
    assert state_dict.keys() == expected.keys()
    for name, tensor in state_dict.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
