"""What the model reads in each step: random token ids, or windows of a text."""

from pathlib import Path

import torch
from torch import Tensor

from model.tokenizer import Tokenizer


class Inputs:
    """A source of (B, T) token ids, drawn on one generator: the same seed, the same ids.

    Drawn on the CPU and then moved, so that a seed names the same data on every device.

    Args:
        n_vocab: random ids are uniform over [0, n_vocab).
        text: ids of a text, int64 (n,), n >= T; None means random ids.
    """

    def __init__(
        self,
        n_vocab: int,
        batch: int,
        length: int,
        seed: int,
        device: torch.device,
        text: Tensor | None = None,
    ) -> None:
        self.n_vocab, self.batch, self.length = n_vocab, batch, length
        self.device, self.text = device, text
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self) -> Tensor:
        """The next step's ids, int64 (B, T)."""
        if self.text is None:
            shape = (self.batch, self.length)
            ids = torch.randint(self.n_vocab, shape, generator=self.generator, device="cpu")
        else:
            starts = torch.randint(
                len(self.text) - self.length + 1,
                (self.batch, 1),
                generator=self.generator,
                device="cpu",
            )
            ids = self.text[starts + torch.arange(self.length, device="cpu")]
        return ids.to(self.device, non_blocking=True)


def read_text(path: Path, tokenizer: Tokenizer, length: int) -> Tensor:
    """The ids of a UTF-8 text file, int64 (n,).

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is shorter than one window.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--inputs {path}: {error}; expected 'random' or a UTF-8 text file"
        ) from error
    if len(ids) < length:
        raise ValueError(
            f"--inputs {path}: {len(ids)} tokens, expected at least one window of {length}; "
            "give a longer text or a smaller --length"
        )
    return torch.tensor(ids, device="cpu")
