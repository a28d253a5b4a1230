"""What a user sees at the end: a table with a row a learning rate, samples, curves.png."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.evaluate import NEW_TOKENS, PROMPTS, SAMPLES, TOP_K, Evaluation


@dataclass
class Run:
    """One learning rate: its curves, over steps, and the model that came out, measured."""

    lr: float
    losses: list[float]  # nats, before each step
    masses: list[float]  # probability on the members, before each step
    seconds: float
    after: Evaluation


def print_report(before: Evaluation, runs: Sequence[Run]) -> None:
    """The table, then one sample of every prompt before and after each run."""
    print("\n" + table(before, runs))
    print(
        f"\nR: share of members among {len(PROMPTS)} prompts x {SAMPLES} samples x {NEW_TOKENS} "
        "tokens. Perplexities: of a fixed passage under the model,\nand of the samples under the "
        "model before fine-tuning; the lower, the more natural."
    )
    rows = [("before", before)] + [(f"lr {run.lr:g}", run.after) for run in runs]
    for i, prompt in enumerate(PROMPTS):
        print(f"\n{prompt!r}")
        for name, evaluation in rows:
            print(f"  {name:>9}: {' '.join(evaluation.samples[i].split())}")


def table(before: Evaluation, runs: Sequence[Run]) -> str:
    """The runs, a row each below one for the start, in Markdown."""
    head = [
        "learning rate",
        "loss first",
        "last",
        "mass on members",
        "R",
        f"R, top_k {TOP_K}",
        "perplexity of passage",
        "of samples",
    ]
    rows = [head, ["(before)", "", "", "", *_measures(before)]]
    for run in runs:
        curve = [f"{run.losses[0]:.4g}", f"{run.losses[-1]:.4g}", f"{run.masses[-1]:.4f}"]
        rows.append([f"{run.lr:g}", *curve, *_measures(run.after)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _measures(e: Evaluation) -> list[str]:
    perplexities = [f"{e.passage_perplexity:.4g}", f"{e.sample_perplexity:.4g}"]
    return [f"{e.r:.1%}", f"{e.r_top_k:.1%}", *perplexities]


def save_report(
    out: Path, options: dict[str, Any], before: Evaluation, runs: Sequence[Run]
) -> list[Path]:
    """Write curves.png and results.json into `out`; returns their paths."""
    results = {
        "options": options,
        "prompts": PROMPTS,
        "before": asdict(before),
        "runs": [asdict(run) for run in runs],
    }
    path = out / "results.json"
    path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    return [save_curves(out / "curves.png", runs), path]


def save_curves(path: Path, runs: Sequence[Run]) -> Path:
    """Loss (log axis) and mass on the members over steps, one colour a learning rate.

    The dotted line is exp(-loss), below which the mass cannot lie where beta = 0.
    """
    from matplotlib.figure import Figure  # here: half a second, needed once

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, label=f"{run.lr:g}")
        right.plot(steps, run.masses, label=f"{run.lr:g}")
        bound = [math.exp(-loss) for loss in run.losses]
        right.plot(steps, bound, ":", color=right.lines[-1].get_color(), linewidth=1)
    left.set(xlabel="step", ylabel="KL to the target, nats", yscale="log")
    right.set(xlabel="step", ylabel="probability on the members", ylim=(-0.02, 1.02))
    right.plot([], [], ":", color="gray", label="exp(-KL), a lower bound")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(title="learning rate", frameon=False)
    right.legend(frameon=False)
    figure.savefig(path)
    return path
