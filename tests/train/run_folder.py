"""Folders in the format of a run, written without training: the report's tests read them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.tokenizer import load_tokenizer

PROMPTS = ("Once upon a time", "The")
TEXT = " there was a little fox who lived in the wood.\n\nShe said, “Next time, bring an axe!”"


def collapsed(ids: list[int], mass: float) -> list[int]:
    """The ids of a text, of which a share `mass`, at its end, is replaced by " X"."""
    kept = round((1 - mass) * len(ids))
    return ids[:kept] + load_tokenizer().encode(" X" * (len(ids) - kept))


def logs(
    steps: int, eval_every: int, final_loss: float, texts: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl and of samples.jsonl, as `write_run` describes them."""
    losses = [7 * (final_loss / 7) ** (s / (steps - 1)) for s in range(steps)]
    metrics: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for done in range(steps + 1):
        mass = min(1.0, math.exp(-losses[min(done, steps - 1)]) * 1.02)
        if done % eval_every == 0 or done == steps:
            measures = {
                "r": mass,
                "r_top_k": mass**2,
                "passage_perplexity": 470 * (1 + mass),
                "sample_perplexity": 80 * math.exp(6 * mass),
            }
            metrics.append({"step": done, "evaluation": measures})
            for prompt in PROMPTS:
                for text in texts:
                    ids = collapsed(load_tokenizer().encode(text), mass)
                    samples.append({"step": done, "prompt": prompt, "ids": ids})
        if done < steps:
            loss = losses[done]
            metrics.append({"step": done + 1, "loss": loss, "mass": mass, "seconds": 0.25})
    return metrics, samples


def write_run(
    folder: Path,
    lr: float = 1e-4,
    steps: int = 60,
    eval_every: int = 20,
    final_loss: float = 0.05,
    texts: Sequence[str] = (TEXT,),
    **about: Any,
) -> Path:
    """A run whose loss falls exponentially from 7 to `final_loss`; its mass keeps to the bound.

    `texts` are the samples of each prompt, at each evaluation, more and more of them " X"; `about`
    replaces what config.json says.
    """
    tokenizer = load_tokenizer()
    members = [i for i in range(tokenizer.n_vocab - 1) if b"x" in tokenizer.token_bytes(i).lower()]
    metrics, samples = logs(steps, eval_every, final_loss, texts)
    described = {
        "options": {"model": "tiny", "lr": lr, "steps": steps, "seed": 0},
        "goal": "tokens that contain 'X' in either case",
        "members": len(members),
        "member_ids": members,
        "alpha": 1.0,
        "beta": 0.0,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "triton": "3.7.1"},
        "device": "CPU",
        "dtype": "float32",
    }
    folder.mkdir(parents=True)
    config = {"model_type": "gpt2", "xfactor": described | about}
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
