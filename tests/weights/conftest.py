"""A small GPT-2 in the layout of OpenAI's files on the hub, with random content."""

from pathlib import Path

import pytest
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


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The path of the file, in a folder of its own."""
    (tmp_path / "official").mkdir()
    return tmp_path / "official" / "model.safetensors"


@pytest.fixture(autouse=True)
def parameters(official: Path) -> dict[str, Tensor]:
    """Write the file and return its parameters, for a test to damage.

    As on the hub, there are masks too, and the header is not padded, so tensors are not aligned.
    """
    P, generator = SMALL.n_positions, torch.Generator().manual_seed(0)
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, P, P).tril() for n in range(SMALL.n_layer)}
    shapes = SMALL.shapes().items()
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    header, body = split(save(tensors | masks, metadata={"format": "pt"}))
    official.write_bytes(join(header.rstrip(), body))
    return tensors


def assert_equal(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for the same names, each a float32 tensor with these values."""
    assert state_dict.keys() == expected.keys()
    for name, tensor in state_dict.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
