"""The benchmark against transformers: both contenders do the same work, and the table is whole."""

import json
from pathlib import Path

import pytest
import torch

from model import GPT2, GPT2Config
from train import benchmark
from train.benchmark import CONTENDERS, NEW_TOKENS, Options, main
from weights import save_weights


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_positions=64, n_embd=64, n_layer=1, n_head=1))
    save_weights(model.state_dict(), tmp_path)
    return str(tmp_path)


def test_both_contenders_train_on_the_same_loss_and_write_the_same_text(folder: str) -> None:
    """Two steps' losses and a greedy text, each against the other's."""
    tokens = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(0))
    members = torch.arange(50257) < 984
    models = [contender(folder, torch.device("cpu")) for contender in CONTENDERS]
    text, other = (m.generate(tokens[:1]) for m in models)
    assert torch.equal(text, other)
    assert text.shape == (1, 8 + NEW_TOKENS)
    turns = [m.steps(tokens, members, "float32") for m in models]
    for _ in range(2):
        (loss, _), theirs = (next(t) for t in turns)
        torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)


def test_the_table_is_whole_and_ends_in_json(folder: str, monkeypatch, capsys) -> None:
    """Every quantity for both contenders, each a positive number."""
    monkeypatch.setattr(benchmark, "layout_of", lambda name, real=benchmark.layout_of: real(folder))
    main(Options(model="tiny", batch=1, length=8, repetitions=2, device="cpu"))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(results) == 6
    for quantity, values in results.items():
        assert set(values) == {"ours", "transformers"}, quantity
        assert all(value > 0 for value in values.values()), quantity
