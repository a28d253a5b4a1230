"""`python -m train.sample`: the text of generate, streamed, with a run's target tokens marked."""

import json
import shutil
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


def test_the_text_is_that_of_generate_with_a_run_s_target_tokens_marked(
    capsys, monkeypatch, small_start: Path, tmp_path: Path
) -> None:
    """Two samples of one seed, with temperature and top-k, against generate on the same model. On
    a terminal only, the tokens that a run's config.json names are highlighted."""
    run = shutil.copytree(small_start, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["xfactor"] = {"target_token_ids": [*range(1, 50257, 2)]}
    (run / "config.json").write_text(json.dumps(config))
    options = Options(str(run), samples=2, length=20, temperature=0.9, top_k=40)
    model, generator = GPT2.from_state_dict(load_weights(run)), torch.Generator().manual_seed(0)
    prompt = torch.tensor([TOKENIZER.encode(options.prompt)])
    rows = [generate(model, prompt, 20, 0.9, 40, generator)[0].tolist() for _ in range(2)]
    texts = [sample._visible(TOKENIZER.decode(row)) for row in rows]
    sample.sample(options)
    plain = capsys.readouterr().out
    assert plain == "\n\n".join(texts) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.sample(options)
    marked = capsys.readouterr().out
    assert marked.replace("\x1b[7m", "").replace("\x1b[0m", "") == plain
    assert 5 < marked.count("\x1b[7m") < 35


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


BAD = {"seed": -1, "temperature": -1.0, "top_k": -1, "samples": 0, "length": 253}


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_refused(option: str) -> None:
    """With what is expected."""
    with pytest.raises(ValueError, match=f"^--{option.replace('_', '-')} .*: expected "):
        sample.sample(Options(**{option: BAD[option]}))


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.json").touch()
    with pytest.raises(ValueError, match=r"^--model .*: expected one of the runs in it: .'a run'."):
        sample.sample(Options(str(tmp_path)))
