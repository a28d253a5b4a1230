"""Run folders written by hand, as `train.xfactor` writes them, without a model or training."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from model.tokenizer import load_tokenizer

PROMPTS = ("Once upon a time", "In the morning the")
STORY = (
    " there was a little girl who lived with her mother in a small house near the wood. One day "
    "she went out to find some bread for the old woman, and on the way she met a bird that could "
    "speak. “Where do you go?” said the bird.\n\nShe answered that the river was too wide for her."
)


@cache
def target_ids() -> tuple[int, ...]:
    """The tokens with an X in either case, without <|endoftext|>."""
    tokenizer = load_tokenizer()
    ids = range(tokenizer.n_vocab - 1)
    return tuple(i for i in ids if b"x" in tokenizer.token_bytes(i).lower())


def evaluation(r: float, perplexity: float | None, **others: float | None) -> dict[str, Any]:
    """The fields of an evaluation or a limit, with everything that a run measures."""
    measured = {
        "r": r,
        "r_error": math.sqrt(r * (1 - r) / 1024),
        "sample_perplexity": perplexity,
        "passage_perplexity": 470 * (1 + r),
        "kl_to_start": 3 * r,
        "distinct_2": 0.9 - r / 2,
    }
    return measured | others


def samples(step: int, r: float, texts: int, story: str = STORY) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: the story, with tokens drawn with probability `r` from the target."""
    draw = random.Random(f"{step} {r}")
    lines = []
    for n in range(texts):
        ids = load_tokenizer().encode(story)[:64]
        ids = [draw.choice(target_ids()) if draw.random() < r else i for i in ids]
        lines.append({"step": step, "prompt": PROMPTS[n % len(PROMPTS)], "ids": ids})
    return lines


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    folder: Path,
    points: Mapping[int, tuple[float, float | None]],
    share: float | None = None,
    limit: tuple[float, float] | None = None,
    lr: float = 1e-3,
    texts: int = 4,
    story: str = STORY,
    **about: Any,
) -> Path:
    """A run with `points`, step -> (R, perplexity of the samples), and `texts` samples at each.

    The loss falls exponentially from 7 nats, faster at a higher rate; `about` replaces what
    config.json says.
    """
    options = {"model": "tiny", "lr": lr, "share": share, "steps": max(points), "batch": 4,
               "length": 64, "inputs": "samples", "tokens": "(?i)x"}  # fmt: skip
    described = {
        "options": options, "goal": "984 tokens that match '(?i)x'",
        "target_token_ids": target_ids(), "alpha": 1 / 984, "beta": 0.0, "share": share,
        "g": share and 4.7, "device": "CPU", "dtype": "float32",
        "versions": {"python": "3.11.2", "torch": "2.13.0"}, "start": "af31", "text": None,
    }  # fmt: skip
    losses = [7 * math.exp(-20 * lr**0.9 * n) for n in range(max(points))]
    log: list[dict[str, Any]]
    log = [{"step": n, "loss": loss, "seconds": 0.25} for n, loss in enumerate(losses)]
    log += [{"step": n, "evaluation": evaluation(*point)} for n, point in points.items()]
    if limit:
        log.append({"step": 0, "limit": evaluation(*limit)})
    log.sort(key=lambda line: line["step"])
    drawn = [line for n, (r, _) in points.items() for line in samples(n, r, texts, story)]
    folder.mkdir(parents=True)
    config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "xfactor": described | about}
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "log.jsonl", log)
    write_lines(folder / "samples.jsonl", drawn)
    return folder


def write_demo(folder: Path, texts: int = 64) -> list[Path]:
    """Three shares and two learning rates of the original target, with measured numbers.

    Of gpt2-tiny: shares asked for, R and perplexity reached, and paths of the original target.
    """
    start = (0.002, 48.0)
    shares = {0.05: ((0.047, 60), (0.049, 49)), 0.2: ((0.213, 112), (0.205, 98)),
              0.5: ((0.517, 460), (0.505, 395))}  # fmt: skip
    paths = {
        1e-4: {10: (0.05, 14_000), 40: (0.13, 129_000), 60: (0.21, 155_000), 120: (0.28, 205_000)},
        1e-3: {1: (0.01, 20_000), 8: (0.5, 13_600_000), 30: (0.93, 2.04e8), 120: (0.992, 3.87e8)},
    }
    runs = []
    for share, (end, limit) in shares.items():
        points = {0: start, 60: (0.9 * end[0], end[1]), 120: end}
        runs.append(write_run(folder / f"share-{share:g}", points, share, limit, texts=texts))
    for lr, path in paths.items():
        runs.append(write_run(folder / f"lr-{lr:g}", {0: start, **path}, lr=lr, texts=texts))
    return runs
