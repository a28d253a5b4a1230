"""`python -m train.sample`: the text of generate, streamed, with a run's target tokens marked."""

import json
import sys
from pathlib import Path

import pytest
import torch

from model import GPT2
from model.generate import generate
from model.tokenizer import load_tokenizer
from train import sample
from train.sample import Options
from weights import load_weights


def printed(capsys: pytest.CaptureFixture[str], **options: object) -> str:
    sample.sample(Options(**options))
    return capsys.readouterr().out


def test_the_text_is_that_of_generate(capsys) -> None:
    """Two samples of one seed, with temperature and top-k, against generate on the same model."""
    tokenizer = load_tokenizer()
    text = printed(capsys, samples=2, length=20, temperature=0.9, top_k=40, seed=3)
    model = GPT2.from_state_dict(load_weights("tiny"))
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([tokenizer.encode("Once upon a time")])
    rows = [
        generate(model, ids, 20, 0.9, 40, generator, stop=tokenizer.eot)[0].tolist()
        for _ in range(2)
    ]
    expected = [tokenizer.decode([i for i in row if i != tokenizer.eot]) for row in rows]
    assert text == expected[0] + "\n\n" + expected[1] + "\n"


def test_tokens_are_printed_as_they_are_sampled(capsys, monkeypatch) -> None:
    """Each piece is out before the next token is asked for; a letter of two tokens comes whole."""
    pieces = []
    crown = "\U0001f451".encode()  # four bytes, in tokens that are not text of their own
    ids = load_tokenizer().encode(" A" + crown.decode() + ".")

    def stream(*_: object):
        for i in ids:
            yield torch.tensor([[i]])
            pieces.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "stream", stream)
    sample.sample(Options(prompt="x"))
    assert len(pieces) == len(ids) > 3
    assert pieces[0] == "x A"
    assert pieces[-2:] == ["\U0001f451", "."]
    assert set(pieces[1:-2]) == {""}


def test_target_tokens_of_a_run_are_highlighted_on_a_terminal_only(
    capsys, monkeypatch, small_start: Path, tmp_path: Path
) -> None:
    """A run's config.json names them; compared to the text without marks."""
    (tmp_path / "run").mkdir()
    for file in ("model.safetensors", "config.json"):
        (tmp_path / "run" / file).write_bytes((small_start / file).read_bytes())
    options = {"model": str(tmp_path / "run"), "length": 30, "seed": 1}
    plain = printed(capsys, **options)
    ids = [i for i in range(50257) if i % 2]
    config = json.loads((small_start / "config.json").read_text())
    about = json.dumps(config | {"xfactor": {"target_token_ids": ids}})
    (tmp_path / "run" / "config.json").write_text(about)
    assert printed(capsys, **options) == plain  # into a file or pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    marked = printed(capsys, **options)
    assert marked.replace("\x1b[7m", "").replace("\x1b[0m", "") == plain
    assert 5 < marked.count("\x1b[7m") < 25


def test_what_could_steer_a_terminal_is_escaped(capsys, monkeypatch) -> None:
    """An escape sequence in the prompt and one out of the model; line breaks stay."""
    ids = load_tokenizer().encode("\x1b[2J\u202e\nb")
    tokens = [torch.tensor([[i]]) for i in ids]
    monkeypatch.setattr(sample, "stream", lambda *_: iter(tokens))
    assert printed(capsys, prompt="\x1b]0;") == "\\x1b]0;\\x1b[2J\\u202e\nb\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"length": 300}, "--length 300: expected at most 252 after this prompt"),
        ({"model": "no/such/run"}, "no weights at no/such/run"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """A ValueError, which the command prints as one line."""
    with pytest.raises(ValueError, match=message):
        sample.sample(Options(**options))
