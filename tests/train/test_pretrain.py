"""How the embedded checkpoint is made: the loss, the shared vocabulary, stopping and going on."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT2
from model.tokenizer import load_tokenizer
from train.pretrain import Options, Pretraining, main
from train.shared_vocabulary import CrossEntropy, SharedVocabulary
from weights import load_weights

STORY = "The fox said to the fox: a box of six foxes is a box of foxes. " * 12


def options(tmp_path: Path, **changes: object) -> Options:
    (tmp_path / "story.txt").write_text(STORY)
    base = Options(
        text=tmp_path / "story.txt",
        held_out=tmp_path / "story.txt",
        out=tmp_path / "out",
        n_layer=1,
        n_embd=64,
        n_positions=16,
        steps=6,
        batch=2,
        warmup=2,
        eval_every=3,
    )
    return dataclasses.replace(base, **changes)


def run(tmp_path: Path, **changes: object) -> Pretraining:
    ids = torch.tensor(load_tokenizer().encode(STORY))
    return Pretraining(options(tmp_path, **changes), ids, 50257)


def test_cross_entropy_and_its_gradients_are_those_of_pytorch() -> None:
    """Against F.cross_entropy in float64; the buffer's float32 sets the tolerance."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(101, 16, generator=generator, requires_grad=True)
    bias = torch.randn(101, generator=generator)
    target = torch.randint(101, (37,), generator=generator)
    loss = CrossEntropy.apply(hidden, weight, bias, target, torch.empty(37, 101))
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    exact = F.cross_entropy(hidden.double() @ weight.double().T + bias.double(), target)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad(3 * exact, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_shared_row_counts_as_all_unused_tokens(tmp_path: Path) -> None:
    """The held-out loss with one row for all unused tokens equals that of the expanded model.

    The text has tokens that the corpus lacks, so both sides of the softmax are tested.
    """
    pretraining = run(tmp_path, dropout=0.0)
    for _ in range(4):
        pretraining.train_step()
    held_out = torch.tensor(load_tokenizer().encode("The fox met a dragon; the box is new."))
    state = {k: v.detach().clone() for k, v in pretraining.model.state_dict().items()}
    state["wte.weight"] = pretraining.vocabulary.expand(state["wte.weight"])
    full = GPT2.from_state_dict(state)
    assert full.config.vocab_size == 50257
    with torch.no_grad():
        exact = F.cross_entropy(full(held_out[None, :-1])[0], held_out[1:])
    assert pretraining.held_out_loss(held_out) == pytest.approx(exact.item(), rel=1e-5)


def test_the_shared_vocabulary_numbers_what_occurs() -> None:
    """Ids that occur are told apart; all others share the last id, and the last row."""
    vocabulary = SharedVocabulary(torch.tensor([7, 3, 7, 9]), 12)
    assert vocabulary.size == 4
    assert vocabulary.n_unused == 9
    assert vocabulary.compact(torch.tensor([3, 7, 9, 0, 11])).tolist() == [0, 1, 2, 3, 3]
    wte = torch.tensor([[3.0], [7.0], [9.0], [-1.0]])
    expanded = vocabulary.expand(wte)[:, 0].tolist()
    assert expanded == [-1, -1, -1, 3, -1, -1, -1, 7, -1, 9, -1, -1]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(tmp_path: Path) -> None:
    """Linear for `warmup` steps, half a cosine after."""
    pretraining = run(tmp_path, steps=102, warmup=2, lr=1.0)
    rates = []
    for pretraining.step in range(103):
        rates.append(pretraining.learning_rate())
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[52] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, capsys) -> None:
    """Three steps, a new process's worth of state from the file, three more: bitwise the same."""
    whole = run(tmp_path)
    for _ in range(6):
        whole.train_step()
    first = run(tmp_path)
    for _ in range(3):
        first.train_step()
    first.best = {n: p.detach().clone() for n, p in first.model.named_parameters()}
    first.save(tmp_path / "state.safetensors")
    second = run(tmp_path)
    second.load(tmp_path / "state.safetensors")
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_command_learns_and_leaves_a_checkpoint(tmp_path: Path, capsys) -> None:
    """From ln(50257) to below 5 nats on a sentence it repeats; float16 and whole on disk."""
    main(options(tmp_path, steps=40, lr=1e-2, eval_every=20))
    best = float(capsys.readouterr().out.split("held-out loss ")[-1].split()[0])
    assert best < 5 < math.log(50257)
    state_dict = load_weights(tmp_path / "out")
    assert state_dict["wte.weight"].shape == (50257, 64)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 2.1 * 50257 * 64 + 200_000
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
