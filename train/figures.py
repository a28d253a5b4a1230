"""The report's five figures, drawn on a page that is light or dark."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.axes import Line, label_ends, log_ticks, over_updates, write_title
from train.results import RunRecord


@dataclass(frozen=True)
class Theme:
    """Colours of a page. `lines` are Okabe and Ito's, told apart under any colour blindness."""

    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]

    def style(self) -> Any:  # Any: matplotlib types the keys as 300 literals
        """Settings of matplotlib."""
        return {
            "axes.edgecolor": self.faint,
            "axes.labelcolor": self.faint,
            "axes.linewidth": 0.8,
            "font.size": 11,
            "grid.color": self.grid,
            "svg.fonttype": "none",  # text in the reader's own font
            "svg.hashsalt": "xfactor",  # the same runs, the same bytes
            "text.color": self.ink,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
        }


LIGHT = Theme(
    ink="#24292f",
    faint="#5d6670",
    grid="#e4e7ea",
    lines=("#0072b2", "#d55e00", "#009e73", "#b8578f", "#8a6d00", "#3d3d3d"),
)
DARK = Theme(
    ink="#dfe3e8",
    faint="#9aa4af",
    grid="#272c33",
    lines=("#56b4e9", "#ff8c42", "#2fc79a", "#e08fc0", "#f0e442", "#c8c8c8"),
)


Painter = Callable[[Axes, list[tuple[RunRecord, str]]], None]


def colours(runs: Sequence[RunRecord], theme: Theme) -> list[str]:
    """The colour of each run: one a learning rate, the palette again after its last."""
    rates = list(dict.fromkeys(run.lr for run in runs))
    return [theme.lines[rates.index(run.lr) % len(theme.lines)] for run in runs]


def draw(runs: Sequence[RunRecord], theme: Theme, kind: Literal["svg", "png"]) -> dict[str, bytes]:
    """The figures by name: loss, mass, r, perplexity, tradeoff; one colour a learning rate.

    An SVG is transparent, so the page's background shows; a PNG's is white. There is one more PNG,
    curves: loss and mass side by side.
    """
    coloured = list(zip(runs, colours(runs, theme), strict=True))
    painters: dict[str, list[Painter]] = {
        "loss": [_loss],
        "mass": [_mass],
        "r": [_r],
        "perplexity": [_perplexity],
        "tradeoff": [_tradeoff],
    }
    if kind == "png":
        painters["curves"] = [_loss, _mass]
    images = {}
    with matplotlib.rc_context(theme.style()):
        for name, panels in painters.items():
            figure = Figure(figsize=(5.4 * len(panels), 3.7), layout="constrained", dpi=160)
            for axes, paint in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
            ):
                axes.grid(linewidth=0.8)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(length=0)
                paint(axes, coloured)
            image = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(image, format=kind, transparent=kind == "svg", metadata=metadata)
            images[name] = image.getvalue()
    return images


def _loss(axes: Axes, runs: list[tuple[RunRecord, str]]) -> None:
    lines = [Line(run.label, colour, range(len(run.losses)), run.losses) for run, colour in runs]
    axes.set_yscale("log", nonpositive="mask")
    over_updates(axes, "KL to the target, nats", lines, "of each step, before its update")


def _mass(axes: Axes, runs: list[tuple[RunRecord, str]]) -> None:
    lines, bounded = [], False
    for run, colour in runs:
        updates = range(len(run.masses))
        lines.append(Line(run.label, colour, updates, run.masses))
        if run.about["beta"] == 0:  # else the target itself has mass elsewhere: no bound
            bound = [math.exp(-loss) for loss in run.losses]
            lines.append(Line(run.label, colour, updates, bound, ":"))
            bounded = True
    axes.set_ylim(-0.02, 1.02)
    key = "dotted: exp(-KL), its lower bound" if bounded else ""
    over_updates(axes, "Probability on the members", lines, key)


def _r(axes: Axes, runs: list[tuple[RunRecord, str]]) -> None:
    lines = []
    for run, colour in runs:
        evaluations = run.evaluations.values()
        lines.append(Line(run.label, colour, [*run.evaluations], [e.r for e in evaluations]))
        top_k = [e.r_top_k for e in evaluations]
        lines.append(Line(run.label, colour, [*run.evaluations], top_k, "--"))
    axes.set_ylim(-0.02, 1.02)
    over_updates(
        axes, "R, the share of members in samples", lines, "solid: untruncated · dashed: top-k"
    )


def _perplexity(axes: Axes, runs: list[tuple[RunRecord, str]]) -> None:
    lines = []
    for run, colour in runs:
        updates, evaluations = [*run.evaluations], run.evaluations.values()
        of_samples = [e.sample_perplexity for e in evaluations]
        of_passage = [e.passage_perplexity for e in evaluations]
        lines.append(Line(run.label, colour, updates, of_samples))
        lines.append(Line(run.label, colour, updates, of_passage, "--"))
    axes.set_yscale("log")
    key = "solid: samples under the model before\ndashed: fixed passage under the model now"
    over_updates(axes, "Perplexity", lines, key)


def _tradeoff(axes: Axes, runs: list[tuple[RunRecord, str]]) -> None:
    axes.set_xscale("log")
    axes.set_ylim(-0.04, 1.04)
    ends = []
    for run, colour in reversed(runs):  # the smallest rate on top: it stays where all begin
        evaluations = run.evaluations.values()
        points = [(e.sample_perplexity, e.r) for e in evaluations if e.sample_perplexity < math.inf]
        if not points:
            continue
        perplexities, rs = zip(*points, strict=True)
        axes.plot(perplexities, rs, "o-", color=colour, markersize=4.5, linewidth=1.5)
        ends.append(Line(run.label, colour, perplexities, rs))
    axes.margins(x=0.12)
    log_ticks(axes.xaxis)
    label_ends(axes, ends)
    write_title(axes, "R against naturalness", "one point an evaluation; left is more natural")
    axes.set_xlabel("perplexity of samples under the model before")
