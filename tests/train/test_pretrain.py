"""How the embedded checkpoint is made: the shared vocabulary, stopping and continuing."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.model.oracle import shake
from train import pretrain
from weights import load_weights

STORY = "The fox said to the fox: a box of six foxes is a box of foxes. " * 12
FILES = Path("story.txt"), Path("story.txt"), Path("out")
OPTIONS = pretrain.Options(*FILES, 1, 64, 16, steps=6, batch=2, warmup=2, eval_every=3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(STORY)


def test_the_shared_row_counts_as_all_unused_tokens() -> None:
    """The held-out loss with one row for all unused tokens equals that of the expanded model; the
    held-out text has tokens that the corpus lacks, so both sides of the softmax are tested."""
    ids, held_out = (
        torch.tensor(load_tokenizer().encode(text))
        for text in (STORY, "The fox met a dragon; the box is new.")
    )
    new_ids, bias = pretrain.share(ids, 50257)
    model, _ = pretrain.make_model(OPTIONS, len(bias))
    shake(model, seed=0)
    state = model.state_dict()
    full = GPT2.from_state_dict(state | {"wte.weight": state["wte.weight"][new_ids]})
    assert full.config.vocab_size == 50257
    with torch.no_grad():
        exact = F.cross_entropy(full(held_out[None, :-1])[0], held_out[1:])
    got = pretrain.held_out_loss(model, bias, new_ids[held_out])
    assert got == pytest.approx(exact.item(), rel=1e-5)


def test_a_stopped_command_given_again_ends_with_the_same_files(monkeypatch, capsys) -> None:
    """SIGTERM in the fifth of six steps, after a save at the third: bit for bit the same."""
    pretrain.pretrain(replace(OPTIONS, out=Path("whole")))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(OPTIONS).items()]
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])

    rate = pretrain.learning_rate

    def stop_in_step_5(options: pretrain.Options, step: int) -> float:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return rate(options, step)

    monkeypatch.setattr(pretrain, "learning_rate", stop_in_step_5)
    with pytest.raises(SystemExit, match="143"):
        pretrain.main()
    monkeypatch.setattr(pretrain, "learning_rate", rate)
    pretrain.main()
    assert "continuing after step 3" in capsys.readouterr().out
    for file in ("model.safetensors", "log.jsonl", "config.json"):
        assert Path("out", file).read_bytes() == Path("whole", file).read_bytes(), file
    got, whole = (torch.load(f"{out}/state.pt", weights_only=True) for out in ("out", "whole"))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(got[part], whole[part], rtol=0, atol=0)


def test_errors_are_one_line_and_change_nothing() -> None:
    """Another shape, a text that is not there, values out of range, a high rate."""
    pretrain.pretrain(OPTIONS)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    for change, message in (
        ({"n_layer": 2}, "Error.* in loading state_dict.*expected a save of the same command"),
        ({"text": Path("none.txt")}, "none.txt: .*expected a text file in UTF-8"),
        ({"batch": 0}, "--batch 0: expected at least 1"),
        ({"dropout": 1.0}, "--dropout 1.0: expected 0 or more, below 1"),
        ({"out": Path("new"), "lr": 1e38}, "step 3: the held-out loss is nan"),
    ):
        with pytest.raises(ValueError, match=f"^.*{message}.*$"):
            pretrain.pretrain(replace(OPTIONS, **change))
        assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


def test_the_command_learns_and_keeps_the_weights_with_the_least_loss(monkeypatch) -> None:
    """From ln(50257) to below 5 nats on a sentence it repeats; float16 and whole on disk. The
    second of three evaluations is said to be the best."""
    seen, losses, measure = [], iter([0.0, -9.0, 0.0]), pretrain.held_out_loss

    def measured(model: GPT2, *rest: torch.Tensor) -> float:
        seen.append(model.ln_f.weight.detach().half().float())
        return measure(model, *rest) + next(losses)

    monkeypatch.setattr(pretrain, "held_out_loss", measured)
    seeds = Mock(wraps=torch.manual_seed)  # of the model, then of the batch of each step
    monkeypatch.setattr(torch, "manual_seed", seeds)
    pretrain.pretrain(replace(OPTIONS, steps=45, lr=1e-2, eval_every=15))
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [15, 30, 45]
    assert [call.args[0] for call in seeds.call_args_list] == [0, *range(45)]
    assert log[-1]["held_out"] < 5 < math.log(50257)
    kept = load_weights("out")
    assert kept["wte.weight"].shape == (50257, 64)
    assert [torch.equal(kept["ln_f.weight"], weight) for weight in seen] == [False, True, False]
    assert Path("out/model.safetensors").stat().st_size < 2.1 * 50257 * 64 + 200_000
