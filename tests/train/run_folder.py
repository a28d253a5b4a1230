"""Run folders written by hand, as `train.xfactor` writes them, without a model or training."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.tokenizer import load_tokenizer
from train.target_tokens import LETTER_X, matching

PROMPTS = ("Once upon a time", "In the morning the")
STORY = (
    " there was a little girl who lived with her mother in a small house near the wood. One day "
    "she went out to find some bread for the old woman, and on the way she met a bird that could "
    "speak. “Where do you go?” said the bird.\n\nShe answered that the river was too wide for her."
)
TARGET_IDS = matching(load_tokenizer(), LETTER_X).nonzero().flatten().tolist()


def evaluation(r: float, perplexity: float | None) -> dict[str, Any]:
    """The fields of an evaluation or a limit."""
    return {
        "r": r, "r_error": math.sqrt(r * (1 - r) / 1024), "sample_perplexity": perplexity,
        "passage_perplexity": 470 * (1 + r), "kl_to_start": 3 * r, "distinct_2": 0.9 - r / 2,
    }  # fmt: skip


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

    A sample is the story, whose end is a share R of target tokens. `about` replaces what
    config.json says.
    """
    described = {
        "options": {"model": "tiny", "lr": lr}, "goal": "984 tokens that match '(?i)x'",
        "target_token_ids": TARGET_IDS, "share": share, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"xfactor": described | about}))
    log: list[dict[str, Any]]
    log = [{"step": n, "loss": 7 / (n + 1), "seconds": 0.25} for n in range(max(points))]
    if limit:
        log.append({"step": 0, "limit": evaluation(*limit)})
    samples, words = [], load_tokenizer().encode(story)
    for step, (r, perplexity) in points.items():
        log.append({"step": step, "evaluation": evaluation(r, perplexity)})
        own = round(64 * (1 - r))
        ids = [*words[:own], *TARGET_IDS[: 64 - own]]
        samples += [{"step": step, "prompt": PROMPTS[n % 2], "ids": ids} for n in range(texts)]
    write_lines(folder / "log.jsonl", log)
    write_lines(folder / "samples.jsonl", samples)
    return folder
