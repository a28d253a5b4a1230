"""What a run starts from: checked options, the model before fine-tuning, the text to train on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model import GPT2, GPT2Config
from model.generate import stream
from model.gpt2 import HEAD_DIM
from model.tokenizer import Tokenizer, load_tokenizer
from train import console, distributed
from train.checkpoint import SAMPLED, digest, read_tensors, write_tensors
from train.cpu import few_row_products
from train.evaluate import positions_needed
from weights import Layout, layout_of, load_weights

TEXTS, BATCH, TOKENS = 100, 50, 256  # texts to sample, how many at a time, and their length


def check(options: Any, device: torch.device) -> Layout:
    """Return the sizes of the start model, not loaded; ValueError for options that cannot run."""
    layout = layout_of(options.model if options.weights in ("", "random") else options.weights)
    tokenizer, ranks = load_tokenizer(), distributed.world_size()
    needed = max(options.length, positions_needed(tokenizer))
    for name, values in (("lr", options.lr), ("tilt", options.tilt or ())):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name}: got {values}, expected each value once")
    if options.tilt and (options.alpha, options.beta, options.mass) != (1.0, 0.0, None):
        raise ValueError("--tilt defines the whole target; leave out --alpha, --beta and --mass")
    if options.strength and not options.tilt:
        raise ValueError("--strength multiplies the G of --tilt; give --tilt too")
    if options.batch % ranks:
        raise ValueError(
            f"--batch {options.batch} is not divisible by {ranks} ranks; give a multiple of {ranks}"
        )
    if options.dtype == "tf32" and device.type != "cuda":
        raise ValueError(f"--dtype tf32: got device {device}, expected cuda; use bfloat16")
    if layout.vocab_size != tokenizer.n_vocab:
        raise ValueError(
            f"the start model has a vocabulary of {layout.vocab_size} tokens, expected "
            f"GPT-2's {tokenizer.n_vocab}"
        )
    if layout.n_positions < needed:
        raise ValueError(
            f"--length {options.length}: the start model has {layout.n_positions} "
            f"positions, expected at least {needed} for this length and the evaluation"
        )
    return layout


def load_start(options: Any, layout: Layout) -> GPT2:
    """Return the start model on the CPU; its parameters require no gradient."""
    if options.weights == "random":
        torch.manual_seed(options.seed)
        start = GPT2(GPT2Config(**asdict(layout), n_head=layout.n_embd // HEAD_DIM))
    else:
        start = GPT2.from_state_dict(load_weights(options.weights or options.model), assign=True)
    return start.requires_grad_(False)


def read_text(name: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Return the ids of a UTF-8 text file, int64 (n,); ValueError if unreadable or n < length."""
    try:
        ids = tokenizer.encode(Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        expected = "expected 'random', 'samples' or a text file in UTF-8"
        raise ValueError(f"--inputs {name}: {error}; {expected}") from error
    if len(ids) < length:
        raise ValueError(
            f"--inputs {name}: {len(ids)} tokens, expected at least one window of {length}; "
            "give a longer text or a smaller --length"
        )
    return torch.tensor(ids, device="cpu")


@torch.no_grad()
def sample_text(folder: Path, start: GPT2, seed: int, device: torch.device, in_use: bool) -> Tensor:
    """Return text sampled from the start model, int64 (n,); read from the folder if it is there.

    Every rank must call it. The main rank samples TEXTS texts of TOKENS tokens.

    Raises ValueError if the text is in use, by a run that has a checkpoint, and not there: sampled
    on another device it might not be the same.
    """
    path, length = folder / SAMPLED, min(TOKENS, start.config.n_positions)
    expected = {"ids": torch.empty(TEXTS, length, dtype=torch.int64)}
    made_by = {"weights": digest(start.parameters()), "seed": str(seed)}
    if distributed.is_main():
        try:
            tensors, found = read_tensors(path, expected)
            if found != made_by | {"text": digest(tensors.values())}:
                raise ValueError("got another text than was sampled")
        except (OSError, ValueError) as error:  # missing or damaged
            if in_use:
                raise ValueError(f"{path}: {error}; restore it, or start another run") from error
            ids = _sample(start.to(device), length, torch.Generator(device).manual_seed(seed))
            start.cpu()
            write_tensors(path, {"ids": ids}, made_by | {"text": digest([ids])})
    distributed.barrier()
    return read_tensors(path, expected)[0]["ids"].flatten()


def _sample(start: GPT2, length: int, generator: torch.Generator) -> Tensor:
    """Sample texts that begin with <|endoftext|>, int64 (TEXTS, length), on the CPU."""
    device, texts = generator.device, []
    prompt = torch.full((BATCH, 1), load_tokenizer().eot, device=device)
    total = TEXTS * length
    console.say(f"sampling {total:,} tokens from the start model to train on")
    with few_row_products(device), tqdm(total=total, unit="token", disable=None) as bar:
        for _ in range(TEXTS // BATCH):
            columns = [prompt]  # (BATCH, 1) each
            for column in stream(start, prompt, length - 1, generator=generator):
                columns.append(column)
                bar.update(BATCH)
            texts.append(torch.cat(columns, 1).cpu())
    return torch.cat(texts)
