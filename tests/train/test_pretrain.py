"""How the embedded checkpoint is made: the shared vocabulary, stopping and resuming."""

import dataclasses
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT2
from model.tokenizer import load_tokenizer
from tests.model.oracle import shake
from train.pretrain import __main__ as pretrain
from weights import load_weights

STORY = "The fox said to the fox: a box of six foxes is a box of foxes. " * 12
OPTIONS = pretrain.Options(
    text=Path("story.txt"),
    held_out=Path("story.txt"),
    out=Path("out"),
    n_layer=1,
    n_embd=64,
    n_positions=16,
    steps=6,
    batch=2,
    warmup=2,
    eval_every=3,
)
COMMAND = (
    "pretrain --text story.txt --held-out story.txt --out out --n-layer 1 --n-embd 64 "
    "--n-positions 16 --steps 6 --batch 2 --warmup 2 --eval-every 3"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(COMMAND))
    Path("story.txt").write_text(STORY)
    return tmp_path


def test_the_shared_row_counts_as_all_unused_tokens() -> None:
    """The held-out loss with one row for all unused tokens equals that of the expanded model.

    The held-out text has tokens that the corpus lacks, so both sides of the softmax are tested.
    """
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


def test_the_shared_vocabulary_numbers_the_tokens_that_occur() -> None:
    """Each token that occurs has its own id; all others share the last id, and the last row."""
    new_ids, bias = pretrain.share(torch.tensor([7, 3, 7, 9]), 12)
    assert bias.tolist() == pytest.approx([0, 0, 0, math.log(9)])
    assert new_ids[torch.tensor([3, 7, 9, 0, 11])].tolist() == [0, 1, 2, 3, 3]
    wte = torch.tensor([3.0, 7.0, 9.0, -1.0])
    assert wte[new_ids].tolist() == [-1, -1, -1, 3, -1, -1, -1, 7, -1, 9, -1, -1]


def test_a_corpus_of_all_tokens_gives_the_shared_row_no_probability() -> None:
    """log 0 is added to its logit."""
    _, bias = pretrain.share(torch.arange(12), 12)
    assert bias.softmax(0).tolist() == pytest.approx([1 / 12] * 12 + [0])


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    """Linear for `warmup` steps, half a cosine after them."""
    options = dataclasses.replace(OPTIONS, steps=102, warmup=2, lr=1.0)
    rates = [pretrain.learning_rate(options, step) for step in range(103)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[52] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_a_stopped_command_given_again_ends_with_the_same_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in the fifth of six steps, after a save at the third: bit for bit the same."""
    pretrain.pretrain(dataclasses.replace(OPTIONS, out=Path("whole")))
    rate = pretrain.learning_rate

    def stop_in_step_5(options: pretrain.Options, step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(options, step)

    monkeypatch.setattr(pretrain, "learning_rate", stop_in_step_5)
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    monkeypatch.setattr(pretrain, "learning_rate", rate)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(Path("out/log.jsonl").read_text().splitlines()) == 1
    capsys.readouterr()
    pretrain.main()
    assert "resuming after step 3" in capsys.readouterr().out
    for file in ("model.safetensors", "state.safetensors", "log.jsonl", "config.json"):
        assert Path("out", file).read_bytes() == Path("whole", file).read_bytes(), file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--n-layer 2", "got no tensor"),
        ("--n-positions 8", r"wpe.weight: got torch.float32 \(16, 64\), expected"),
        ("--text none.txt", "none.txt: .*expected a text file in UTF-8"),
        ("--held-out bytes", "bytes: .*expected a text file in UTF-8"),
        ("--n-positions 1000", "story.txt: got 2.. tokens, expected more than 1000"),
        ("--out story.txt", "story.txt"),
        ("--out ~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("--text ~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("--n-layer 0", "--n-layer 0: .*greater than or equal to 1"),
        ("--n-embd 100", "--n-embd 100: .*a multiple of 64"),
        ("--n-positions 0", "--n-positions 0: "),
        ("--steps 0", "--steps 0: "),
        ("--batch -1", "--batch -1: "),
        ("--lr nan", "--lr nan: .*finite"),
        ("--warmup -1", "--warmup -1: "),
        ("--weight-decay -0.1", "--weight-decay -0.1: "),
        ("--dropout 1", "--dropout 1.0: .*less than 1"),
        ("--eval-every -1", "--eval-every -1: "),
        ("--seed -1", "--seed -1: "),
        ("--out new --lr 1e38", "step 3: the held-out loss is nan"),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shape, unreadable texts, paths of unknown users, values out of range, a high rate."""
    pretrain.main()
    Path("bytes").write_bytes(b"\xff\xfe")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.setattr(sys, "argv", shlex.split(f"{COMMAND} {change}"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*$"):
        pretrain.main()
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


def test_the_command_learns_and_leaves_a_checkpoint() -> None:
    """From ln(50257) to below 5 nats on a sentence it repeats; float16 and whole on disk."""
    pretrain.pretrain(dataclasses.replace(OPTIONS, steps=40, lr=1e-2, eval_every=20))
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [20, 40]
    assert log[-1]["held_out"] < 5 < math.log(50257)
    assert load_weights("out")["wte.weight"].shape == (50257, 64)
    assert Path("out/model.safetensors").stat().st_size < 2.1 * 50257 * 64 + 200_000


def test_the_weights_kept_are_those_with_the_least_held_out_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three evaluations whose losses are given, the second."""
    seen, losses = [], iter([3.0, 1.0, 2.0])

    def given_loss(model: GPT2, *rest: object) -> float:
        seen.append(model.ln_f.weight.detach().half().float())
        return next(losses)

    monkeypatch.setattr(pretrain, "held_out_loss", given_loss)
    pretrain.pretrain(dataclasses.replace(OPTIONS, eval_every=2, lr=0.1))
    kept = load_weights("out")["ln_f.weight"]
    assert [torch.equal(kept, weight) for weight in seen] == [False, True, False]
