"""What a run starts from: the start model, and the text to train on."""

from dataclasses import asdict
from hashlib import sha256

import torch
from torch import Tensor

from kernels import TwoLevelTarget
from model import GPT2, GPT2Config
from model.generate import stream
from model.gpt2 import HEAD_DIM
from model.tokenizer import load_tokenizer
from train import share as shares
from train.command import expect, progress, say
from weights import layout_of, load_weights
from weights.layout import expand

TEXTS, TOKENS = 256, 128  # texts to sample, and their length
BATCH = 64  # texts sampled at a time


def load_start(model: str, random: bool, seed: int) -> GPT2:
    """Return the start model on the CPU; its parameters require no gradient."""
    if random:
        layout = layout_of(model)
        torch.manual_seed(seed)
        start = GPT2(GPT2Config(**asdict(layout), n_head=layout.n_embd // HEAD_DIM))
    else:
        start = GPT2.from_state_dict(load_weights(model), assign=True)
    expected = f"GPT-2's vocabulary of {load_tokenizer().n_vocab} tokens"
    expect(start.config.vocab_size == load_tokenizer().n_vocab, "model", model, expected)
    return start.requires_grad_(False).eval()


def read_text(path: str, length: int) -> Tensor:
    """Return the ids of a UTF-8 text file, int64 (n,); ValueError if unreadable or n < length."""
    try:
        ids = load_tokenizer().encode(expand(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        expected = "expected random, samples or a text file in UTF-8"
        raise ValueError(f"--inputs {path}: {error}; {expected}") from error
    expect(len(ids) >= length, "inputs", path, f"at least {length} tokens, it has {len(ids)}")
    return torch.tensor(ids)


def sample_texts(start: GPT2, count: int, bias: Tensor | None, seed: int) -> Tensor:
    """Sample texts that begin with <|endoftext|>, int64 (count, T), on the model's device.

    bias: (V,), added to the logits.
    """
    device, length = start.wte.weight.device, min(TOKENS, start.config.n_positions)
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.full((BATCH, 1), load_tokenizer().eot, device=device)
    texts = []
    for n in range(count // BATCH):
        label = f"batch {n + 1} of {count // BATCH}, sampling tokens"
        columns = stream(start, prompt, length - 1, generator=generator, logit_bias=bias)
        texts.append(torch.cat([prompt, *progress(columns, label, length - 1)], 1))
    return torch.cat(texts)


def make_inputs(
    source: str, start: GPT2, target: TwoLevelTarget, length: int, share: float | None, seed: int
) -> tuple[Tensor | None, float | None]:
    """Return the text to train on, int64 (n,), or None for random ids; and the G of a share.

    source: "random", "samples" or a file. For a share, the start model writes half of the samples
    and the tilted start the other half, because the model must learn to write a first target token
    and to go on after one.

    Raises ValueError for a file that cannot be used.
    """
    text, g = None, None
    if source not in ("random", "samples"):
        text = read_text(source, length)
    if share is not None or source == "samples":
        count = TEXTS if share is None else TEXTS // 2
        say(f"sampling {count} texts from the start model")
        own = sampled = sample_texts(start, count, None, seed)
    if share is not None:
        g = shares.solve(shares.target_mass(start, own, target.mask), share)
        say(f"a share of {share:.3g} is {g:.2f} nats on each target token's logit")
        if source == "samples":
            say(f"sampling {TEXTS - count} texts with this bias")
            tilted = sample_texts(start, TEXTS - count, g * target.mask, seed + 1)
            sampled = torch.cat((own, tilted))
    return sampled.flatten().cpu() if source == "samples" else text, g


def fingerprint(*tensors: Tensor) -> str:
    """Return 16 hexadecimal digits that tell these tensors from changed ones."""
    digest = sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
