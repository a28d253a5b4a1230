"""The benchmark against transformers: both contenders do the same work."""

from pathlib import Path

import torch

from train.benchmark import CONTENDERS, NEW_TOKENS


def test_both_contenders_train_on_the_same_loss_and_write_the_same_text(small_start: Path) -> None:
    """Two steps' losses and a greedy text, each against the other's."""
    tokens = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(0))
    both = [make(str(small_start), torch.device("cpu")) for make in CONTENDERS.values()]
    text, other = (contender.generate(tokens[:1]) for contender in both)
    assert torch.equal(text, other)
    assert text.shape == (1, 8 + NEW_TOKENS)
    steps = [contender.train(tokens, "float32") for contender in both]
    for _ in range(2):
        ours, theirs = (next(s) for s in steps)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
