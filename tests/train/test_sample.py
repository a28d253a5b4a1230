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

TOKENIZER = load_tokenizer()


def test_the_text_is_that_of_generate(capsys) -> None:
    """Two samples of one seed, with temperature and top-k, against generate on the same model."""
    model, generator = GPT2.from_state_dict(load_weights("tiny")), torch.Generator()
    sample.sample(Options("tiny", samples=2, length=20, temperature=0.9, top_k=40))
    ids, text = torch.tensor([TOKENIZER.encode("Once upon a time")]), []
    generator.manual_seed(0)
    for _ in range(2):
        (row,) = generate(model, ids, 20, 0.9, 40, generator, stop=TOKENIZER.eot)
        text.append(TOKENIZER.decode([i for i in row.tolist() if i != TOKENIZER.eot]))
    assert capsys.readouterr().out == "\n\n".join(text) + "\n"


def test_tokens_are_printed_as_they_are_sampled(capsys, monkeypatch) -> None:
    """Each piece is out before the next token is asked for; a letter of several tokens comes whole,
    and what could steer a terminal is escaped."""
    pieces, ids = [], TOKENIZER.encode(" A\U0001f451.\x1b[2J\u202e\n")

    def stream(*_: object):
        for i in ids:
            yield torch.tensor([[i]])
            pieces.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "stream", stream)
    sample.sample(Options(prompt="\x1b]0;"))
    assert len(pieces) == len(ids)
    assert pieces[0] == "\\x1b]0; A"
    assert pieces[1:4] == ["", "\U0001f451", "."]
    assert "".join(pieces[4:]) == "\\x1b[2J\\u202e\n"


def test_target_tokens_of_a_run_are_highlighted_on_a_terminal_only(
    capsys, monkeypatch, copy: Path
) -> None:
    """A run's config.json names them; compared to the text without marks."""
    config = json.loads((copy / "config.json").read_text())
    config["xfactor"]["target_token_ids"] = list(range(1, 50257, 2))
    (copy / "config.json").write_text(json.dumps(config))
    sample.sample(Options(str(copy), length=30))
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.sample(Options(str(copy), length=30))
    marked = capsys.readouterr().out
    assert marked.replace("\x1b[7m", "").replace("\x1b[0m", "") == plain
    assert 5 < marked.count("\x1b[7m") < 25


BAD = {"seed": -1, "temperature": -1.0, "top_k": -1, "samples": 0, "length": 253}


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_refused(option: str) -> None:
    """With what is expected."""
    with pytest.raises(ValueError, match=f"^--{option.replace('_', '-')} .*: expected "):
        sample.sample(Options(**{option: BAD[option]}))


def test_a_folder_of_runs_names_them(whole_run: Path) -> None:
    with pytest.raises(ValueError, match=r"^--model .*: expected one of the runs in it: \['run'\]"):
        sample.sample(Options(str(whole_run.parent)))
