"""`python -m train.sample`: the text of generate, streamed, with a run's target tokens marked."""

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


def printed(capsys: pytest.CaptureFixture[str], **options: object) -> str:
    sample.sample(Options(**options))
    return capsys.readouterr().out


def test_the_text_is_that_of_generate(capsys) -> None:
    """Two samples of one seed, with temperature and top-k, against generate on the same model."""
    text = printed(capsys, samples=2, length=20, temperature=0.9, top_k=40, seed=3)
    model, generator = GPT2.from_state_dict(load_weights("tiny")), torch.Generator().manual_seed(3)
    ids = torch.tensor([TOKENIZER.encode("Once upon a time")])
    rows = [generate(model, ids, 20, 0.9, 40, generator, stop=TOKENIZER.eot)[0] for _ in range(2)]
    expected = [TOKENIZER.decode([i for i in row.tolist() if i != TOKENIZER.eot]) for row in rows]
    assert text == expected[0] + "\n\n" + expected[1] + "\n"


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
    assert pieces[1:4] == ["", "", "\U0001f451"]
    assert "".join(pieces[4:]) == ".\\x1b[2J\\u202e\n"


def test_target_tokens_of_a_run_are_highlighted_on_a_terminal_only(
    capsys, monkeypatch, whole_run: Path
) -> None:
    """A run's config.json names them; compared to the text without marks."""
    options = {"model": str(whole_run), "length": 30, "seed": 1}
    plain = printed(capsys, **options)
    assert plain.count("X") + plain.count("x") > 3  # the run was trained to write them
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    marked = printed(capsys, **options)
    assert marked.replace("\x1b[7m", "").replace("\x1b[0m", "") == plain
    assert marked.count("\x1b[7mX\x1b[0m") + marked.count("\x1b[7mx\x1b[0m") > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"samples": 0}, "--samples"),
        ({"length": 300}, "--length 300: expected 1 to 252 after this prompt"),
        ({"model": "no/such/run"}, "no weights at no/such/run"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """A ValueError, which the command prints as one line."""
    with pytest.raises(ValueError, match=message):
        sample.sample(Options(**options))


def test_a_folder_of_runs_names_them(whole_run: Path) -> None:
    """Runs lie side by side in it."""
    with pytest.raises(ValueError, match=r"--model .*: expected one of the runs in it: \['run'\]"):
        sample.sample(Options(model=str(whole_run.parent)))
