"""Text from a model or from a run, printed as it is sampled.

    python -m train.sample --prompt "In the morning the"
    python -m train.sample --model gpt2-medium --temperature 0.8 --top-k 50
    python -m train.sample --model runs/xfactor/lr-0.0001 --samples 3

On a terminal, the target tokens of a run are highlighted. Control characters are escaped.
"""

import codecs
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import tyro
from annotated_types import Ge, Le
from pydantic import FiniteFloat

from model import GPT2
from model.generate import stream
from model.tokenizer import load_tokenizer
from train import console, cpu
from weights import load_weights
from weights.layout import expand, printable

HIGHLIGHTED = "\x1b[7m{}\x1b[0m"  # reverse video, readable on any background
Count = Annotated[int, Ge(1), Le(65_536)]


@dataclass(frozen=True)
class Options:
    """Print text sampled from a GPT-2."""

    model: str = "tiny"  # tiny, gpt2, gpt2-medium, gpt2-xl, a safetensors file or a run's folder
    prompt: str = "Once upon a time"  # text to continue
    samples: Count = 1  # texts to print, one after the other
    length: Count = 64  # new tokens per sample; fewer if the text ends before
    temperature: Annotated[FiniteFloat, Ge(0)] = 1.0  # divides the logits; 0: the likeliest token
    top_k: Annotated[int, Ge(0)] = 0  # sample among the k likeliest tokens only; 0: among all
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0  # the same seed gives the same text


def sample(options: Options) -> None:
    """Print the samples; ValueError for weights that cannot be loaded or an option out of range."""
    options = console.validated(Options, asdict(options))
    tokenizer = load_tokenizer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT2.from_state_dict(load_weights(options.model), assign=True).to(device)
    if model.config.vocab_size != tokenizer.n_vocab:
        got = model.config.vocab_size
        raise ValueError(f"{options.model}: got {got} tokens, expected GPT-2's {tokenizer.n_vocab}")
    targets: set[int] = set()
    if sys.stdout.isatty():
        with suppress(OSError, ValueError, LookupError, TypeError):  # not a run's folder
            config = json.loads((expand(options.model) / "config.json").read_bytes())
            targets = set(config["xfactor"]["target_token_ids"])
    prompt = torch.tensor([tokenizer.encode(options.prompt) or [tokenizer.eot]], device=device)
    if options.length > (room := model.config.n_positions - prompt.shape[1]):
        raise ValueError(f"--length {options.length}: expected at most {room} after this prompt")
    generator = torch.Generator(device).manual_seed(options.seed)
    choice = options.temperature, options.top_k or None, generator, tokenizer.eot
    for n in range(options.samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # for characters of two tokens
        console.say("\n" * (n > 0) + _visible(options.prompt), end="")
        with cpu.few_row_products(device):
            for token in map(int, stream(model, prompt, options.length, *choice)):
                if token != tokenizer.eot:
                    text = _visible(decoder.decode(tokenizer.token_bytes(token)))
                    highlight = text and token in targets
                    console.say(HIGHLIGHTED.format(text) if highlight else text, end="")
        console.say(decoder.decode(b"", final=True))


def _visible(text: str) -> str:
    """Escape control characters other than line breaks, which could steer a terminal."""
    return "\n".join(map(printable, text.split("\n")))


if __name__ == "__main__":
    with console.command():
        sample(tyro.cli(Options, prog="python -m train.sample", description=__doc__))
