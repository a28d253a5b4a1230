"""Run folders written without training, for the report's tests."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.tokenizer import load_tokenizer

PROMPTS = ("Once upon a time", "The")
TEXT = " there was a little fox who lived in the wood.\n\nShe said, “Next time, bring an axe!”"


def collapsed(ids: list[int], share: float) -> list[int]:
    """The ids of a text with the last `share` of them replaced by " X"."""
    kept = round((1 - share) * len(ids))
    return ids[:kept] + load_tokenizer().encode(" X" * (len(ids) - kept))


def logs(
    steps: int, eval_every: int, final_loss: float, texts: Sequence[str], predicted: float | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl and samples.jsonl, as `write_run` describes them."""
    losses = [7 * (final_loss / 7) ** (s / max(steps - 1, 1)) for s in range(steps)]
    metrics: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for done in range(steps + 1):
        share = min(1.0, math.exp(-losses[min(done, steps - 1)]) * 1.02)
        if predicted is not None:
            share = predicted * (1 - math.exp(-5 * done / steps))
        share = share if done else 0.001  # one start for runs of any settings
        if done % eval_every == 0 or done == steps:
            measures = {
                "r": share,
                "r_top_k": share**2,
                "passage_perplexity": 470 * (1 + share),
                "sample_perplexity": 48
                * math.exp((16 if predicted is None else 4.5) * (share - 0.001)),
            }
            metrics.append({"step": done, "evaluation": measures})
            for prompt in PROMPTS:
                for text in texts:
                    ids = collapsed(load_tokenizer().encode(text), share)
                    samples.append({"step": done, "prompt": prompt, "ids": ids})
        if done < steps:
            line = {"step": done + 1, "loss": losses[done], "target_probability": share,
                    "seconds": 0.25}  # fmt: skip
            if predicted is not None:
                line["predicted_probability"] = predicted
            metrics.append(line)
    return metrics, samples


def write_run(
    folder: Path,
    lr: float = 1e-4,
    tilt: float | None = None,
    steps: int = 60,
    eval_every: int = 20,
    final_loss: float = 0.05,
    predicted: float = 0.25,
    texts: Sequence[str] = (TEXT,),
    **about: Any,
) -> Path:
    """A run whose loss falls exponentially from 7 to `final_loss`.

    Without a tilt its target probability keeps to the bound exp(-loss); with one it rises to
    `predicted`. `texts` are the samples of each prompt at each evaluation, more and more of each
    replaced by " X"; `about` replaces what config.json says.
    """
    tokenizer = load_tokenizer()
    targets = [i for i in range(tokenizer.n_vocab - 1) if b"x" in tokenizer.token_bytes(i).lower()]
    metrics, samples = logs(
        steps, eval_every, final_loss, texts, None if tilt is None else predicted
    )
    tilts = [] if tilt is None else [tilt]
    described = {
        "options": {
            "model": "tiny",
            "lr": [lr],
            "tilt": tilts,
            "steps": steps,
            "batch": 4,
            "length": 64,
        },
        "lr": lr,
        "tilt": tilt,
        "goal": "tokens that contain 'X' in either case",
        "target_token_ids": targets,
        "alpha": 1.0,
        "beta": 0.0,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "triton": "3.7.1"},
        "device": "CPU",
        "dtype": "float32",
    }
    folder.mkdir(parents=True)
    config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "xfactor": described | about}
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
