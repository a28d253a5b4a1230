"""Sample text from a model or from a run, and print it token by token.

    python -m train.sample --prompt "In the morning the"
    python -m train.sample --model gpt2-medium --temperature 0.8 --top-k 50
    python -m train.sample --model runs/xfactor --samples 3

On a terminal it highlights the target tokens of a run. It escapes control characters.
"""

import codecs
import sys
from dataclasses import dataclass

import torch

from model import GPT2
from model.generate import stream
from model.tokenizer import load_tokenizer
from train.command import command, expect, parse, say
from train.folder import CONFIG, read_config
from weights import load_weights
from weights.layout import expand, printable

HIGHLIGHTED = "\x1b[7m{}\x1b[0m"  # reverse video, readable on any background


@dataclass(frozen=True)
class Options:
    """Print text sampled from a GPT-2."""

    model: str = "tiny"
    """sample from tiny, gpt2, gpt2-medium, gpt2-xl, a safetensors file or the folder of a run"""
    prompt: str = "Once upon a time"  # continue this text
    samples: int = 1  # print this many texts
    length: int = 64  # write at most this many new tokens per text
    temperature: float = 1.0  # divide the logits by this (0: take the likeliest token)
    top_k: int = 0  # sample among the k likeliest tokens only (0: among all)
    seed: int = 0  # sample from this seed; it gives the same text each time


def sample(options: Options) -> None:
    """Print samples; ValueError for weights that cannot be loaded or an option out of range."""
    expect(options.samples > 0, "samples", options.samples, "at least 1")
    expect(options.top_k >= 0, "top-k", options.top_k, "0 (all tokens) or more")
    expect(options.temperature >= 0, "temperature", options.temperature, "0 (greedy) or more")
    expect(0 <= options.seed < 2**63, "seed", options.seed, "0 to 2^63 - 1")
    folder, tokenizer = expand(options.model), load_tokenizer()
    if runs := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        expect((folder / CONFIG).exists(), "model", folder, f"one of the runs in it: {runs}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT2.from_state_dict(load_weights(options.model), assign=True).to(device)
    expect(model.config.vocab_size == tokenizer.n_vocab, "model", folder, "GPT-2's vocabulary")
    run = read_config(folder) if folder.is_dir() and sys.stdout.isatty() else None
    targets = set(run["target_token_ids"]) if run else set()
    prompt = torch.tensor([tokenizer.encode(options.prompt) or [tokenizer.eot]]).to(device)
    room = model.config.n_positions - prompt.shape[1]
    expect(0 < options.length <= room, "length", options.length, f"1 to {room} after this prompt")
    generator = torch.Generator(device).manual_seed(options.seed)
    choice = options.temperature, options.top_k or None, generator, tokenizer.eot
    for n in range(options.samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # for characters of two tokens
        say("\n" * (n > 0) + _visible(options.prompt), end="")
        try:
            for token in map(int, stream(model, prompt, options.length, *choice)):
                if token != tokenizer.eot:
                    text = _visible(decoder.decode(tokenizer.token_bytes(token)))
                    say(HIGHLIGHTED.format(text) if text and token in targets else text, end="")
        finally:  # also after Ctrl-C: end the line before its message
            say(decoder.decode(b"", final=True))


def _visible(text: str) -> str:
    """Escape control characters other than line breaks, which could steer a terminal."""
    return "\n".join(map(printable, text.split("\n")))


if __name__ == "__main__":
    with command():
        sample(parse(Options, __doc__, "python -m train.sample"))
