"""The benchmark against transformers: both contenders do the same work, and the table is whole."""

import json
from pathlib import Path

import torch

from train import benchmark
from train.benchmark import CONTENDERS, NEW_TOKENS, Options
from weights import layout_of


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


def test_the_table_is_whole_and_ends_in_json(small_start: Path, monkeypatch, capsys) -> None:
    """Every quantity for both contenders, each a positive number; sizes are the small model's."""
    monkeypatch.setattr(benchmark, "layout_of", lambda name: layout_of(small_start))
    benchmark.benchmark(Options("tiny", batch=1, length=8, repetitions=1, device="cpu"))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(results) == 6
    for quantity, values in results.items():
        assert set(values) == {"ours", "transformers"}, quantity
        assert all(value > 0 for value in values.values()), quantity
