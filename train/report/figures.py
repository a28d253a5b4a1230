"""Draw the report's figures for a light or a dark page, whatever style the user's matplotlib has."""

import io
import logging
import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ["MPLBACKEND"] = "agg"  # a notebook's, inherited, makes the import fail
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not a warning per line of a matplotlibrc

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from train.report.runs import Run, compare, scientific
from train.report.texts import finding, percent, pieces, plain, table


class Theme(NamedTuple):
    """Colours of a page; oranges are runs with the original target, blues those with a share."""

    ink: str
    faint: str
    grid: str
    ground: str
    mark: str  # behind target tokens
    shades: tuple[float, float]  # of matplotlib's Oranges and Blues, first run to last


LIGHT = Theme("#24292f", "#5d6670", "#e4e7ea", "#ffffff", "#ffe3a3", (0.5, 0.85))
DARK = Theme("#dfe3e8", "#9aa4af", "#272c33", "#14171b", "#5c4708", (0.6, 0.4))
CURVES = {  # the titles, by name
    "loss": "Loss: KL to the target, nats",
    "r": "R: share of target tokens in the samples",
    "perplexity": "Perplexity of the samples under the start model",
    "position": "R by position in the sample, after training",
}
STYLE: dict[Any, Any] = {  # Any: matplotlib types the keys as 300 literals
    "axes.axisbelow": True, "axes.facecolor": "none", "axes.grid": True,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
    "axes.titlesize": 11, "axes.titleweight": "bold", "font.size": 11,
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.12,
    "legend.fontsize": 10, "legend.frameon": False, "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text in the reader's own font
    "svg.hashsalt": "xfactor",  # the same runs, the same bytes
    "text.parse_math": False,  # a folder's name and a model's text may hold a $
    "xtick.major.size": 0, "xtick.minor.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def draw(panels: list[list[str]], runs: Sequence[Run], theme: Theme, kind: str) -> bytes:
    """Draw rows of panels, as "png", or as "svg": transparent, for the page's background.

    panels: names of CURVES; or "frontier", R against the perplexity of the samples, alone or with
    "texts", some of the samples, beside it.
    """
    style = STYLE | {"figure.facecolor": theme.ground, "grid.color": theme.grid,
                     "text.color": theme.ink, "axes.edgecolor": theme.faint,
                     "axes.labelcolor": theme.faint, "xtick.color": theme.faint,
                     "ytick.color": theme.faint}  # fmt: skip
    size = 5.5 * len(panels[0]), 5.5 if "frontier" in panels[0] else 3.6 * len(panels)
    with matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no font has
        figure = Figure(figsize=size, layout="constrained")
        for name, axes in figure.subplot_mosaic(panels).items():
            paint = {"frontier": _frontier, "texts": _texts}.get(name, partial(_curve, name))
            paint(axes, runs, theme, colours(runs, theme))
        if "texts" in panels[0]:
            title = finding(runs).replace("; ", ";\n")
            figure.suptitle(title, x=0.012, ha="left", size=12, weight="bold")
        elif "frontier" not in panels[0]:
            chosen = runs if len(runs) <= 9 else [*runs[:6], *runs[-3:]]  # of 200, some
            lines = [Line2D([], [], color=colours(runs, theme)[run]) for run in chosen]
            labels = [run.label for run in chosen]
            figure.legend(lines, labels, loc="outside upper left", ncols=3 * len(panels[0]))
        figure.savefig(image := io.BytesIO(), format=kind, dpi=200, transparent=kind == "svg",
                       metadata={"Date": None})  # fmt: skip
        return image.getvalue()


def colours(runs: Sequence[Run], theme: Theme) -> dict[Run, str]:
    """Return the colour of each run: shades of its family's hue, in the order of the runs."""
    found = {}
    for name, original in (("Oranges", True), ("Blues", False)):
        family = [run for run in runs if (run.share is None) == original]
        shades = matplotlib.colormaps[name](np.linspace(*theme.shades, len(family)))
        found |= zip(family, map(matplotlib.colors.to_hex, shades), strict=True)
    return found


def thin(values: Sequence[float], buckets: int) -> np.ndarray:
    """Return the indices of the lowest and the highest value of each bucket, and of the ends.

    With a bucket per pixel a long curve looks as it does with all its points.
    """
    ys = np.asarray(values)
    kept = np.flatnonzero(np.isfinite(ys))
    parts = [part for part in np.array_split(kept, buckets) if len(part)]
    extremes = [index for p in parts for index in (p[ys[p].argmin()], p[ys[p].argmax()])]
    return np.unique(np.array([*kept[:1], *extremes, *kept[-1:]], dtype=int))


def _curve(
    name: str, axes: Axes, runs: Sequence[Run], theme: Theme, colours: dict[Run, str]
) -> None:
    axes.set(title=CURVES[name], xlabel="token of the sample" if name == "position" else "step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for run in runs:
        evaluations = run.evaluations.values()
        steps: Sequence[float] = [*run.evaluations]
        if name == "loss":
            steps = thin(run.losses, max(400 // len(runs), 20))
            values = np.asarray(run.losses)[steps]
        elif name == "position":  # the mean of 8 tokens, as one of 64 texts is too noisy
            parts = [[t[at : at + 8] for t in run.last_texts if t[at:]] for at in range(0, 64, 8)]
            values = [np.mean([run.share_of(ids) for ids in part]) for part in parts if part]
            steps = range(4, 8 * len(values), 8)
        else:
            values = [e.r if name == "r" else e.sample_perplexity for e in evaluations]
        axes.plot(steps, values, "-" if len(values) > 20 else ".-", color=colours[run])
    if name in ("r", "position"):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    else:
        _log_axis(axes)


def _log_axis(axes: Axes) -> None:
    if axes.dataLim.minposy < math.inf:  # else there is nothing that it can show
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(_Plain())
        axes.yaxis.set_minor_formatter(_Plain())  # 40 within a decade


class _Plain(LogFormatter):
    """Labels of a log axis without mathematics: 0.4, 100,000, 1e6."""

    def __call__(self, y: float, pos: int | None = None) -> str:
        return super().__call__(y, pos) and (f"{y:,g}" if y < 1e6 else scientific(y))


def _frontier(axes: Axes, runs: Sequence[Run], theme: Theme, colours: dict[Run, str]) -> None:
    """Draw the original target's paths, the limit, the runs with a share, and what lies between."""
    axes.set(xlim=(-0.03, 1.03), ymargin=0.1, xlabel="R: share of target tokens in sampled text")
    axes.set_ylabel("perplexity under the start model:  text  →  noise")
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    label = partial(axes.annotate, textcoords="offset points", weight="bold")
    ends = []
    for run in runs:
        path = [(e.r, e.sample_perplexity) for e in run.evaluations.values()]
        path = [point for point in path if math.isfinite(point[1])]
        if path and run.share is None:
            axes.plot(*zip(*path, strict=True), ".-", color=colours[run])
            ends.append((path[-1], run))
        elif path:
            axes.errorbar(*path[-1], xerr=run.end.r_error, fmt="o", color=colours[run], ms=11)
            label(percent(run.share), path[-1], (9, 9), color=colours[run])
    below, family = math.inf, "original target, "
    for (x, y), run in sorted(ends, reverse=True, key=lambda end: end[0][1])[:6]:
        below = min(y, below / 4)  # clear of the label above
        align, shift = ("right", (-4, 7)) if x > 0.8 else ("left", (8, -4))
        label(family + run.label, (x, below), shift, color=colours[run], ha=align)
        family = ""  # said once
    for first in {run.origin: run for run in reversed(runs)}.values():
        limits = [run.limit for run in runs if run.limit.r >= 0 and run.origin == first.origin]
        points = sorted((e.r, e.sample_perplexity) for e in [first.start, *limits])
        axes.plot(*zip(*points, strict=True), "--d", color=theme.ink, ms=4, lw=1.4, zorder=4)
        label("start", points[0], (0, -17), ha="center", weight="normal")
        if limits:
            align, shift = ("right", (0, -30)) if points[-1][0] > 0.6 else ("left", (2, -20))
            label("limit: logit bias at sampling", points[-1], shift, ha=align, weight="normal")
    if found := compare(runs):
        x, low, high = found.run.end.r, found.run.end.sample_perplexity, found.perplexity
        arrow = {"arrowstyle": "<->", "color": theme.ink, "lw": 1.4, "shrinkA": 2, "shrinkB": 8}
        axes.annotate("", (x, low), (x, high), arrowprops=arrow)
        middle = (x, math.sqrt(low) * math.sqrt(high))
        label(f"{plain(high / low, 2)} ×", middle, (8, 0), size=17)
        label("perplexity at the same share", middle, (9, -13), size=9, weight="normal")
    _log_axis(axes)


def _texts(axes: Axes, runs: Sequence[Run], theme: Theme, colours: dict[Run, str]) -> None:
    """Write a heading and three lines of text for each of six moments at most."""
    axes.set_axis_off()
    shown = [row for row in table(runs) if row.texts]
    for i, row in enumerate([*shown[:5], *shown[5:][-1:]]):
        top, one = 1.02 - i / 5.6, row.measured
        numbers = f"R {percent(one.r)}, perplexity {plain(one.sample_perplexity)}"
        colour = colours[row.run] if row.step else theme.ink
        axes.text(0, top, row.title, color=colour, weight="bold", va="top", size=9.5)
        axes.text(1, top, numbers, color=theme.faint, va="top", ha="right", size=8.5)
        written = pieces(next(iter(row.texts.values())), row.run.targets)
        text = "".join(piece for piece, _ in written)
        marks = "".join(("█" if target else " ") * len(piece) for piece, target in written)
        lines, blocks, end = textwrap.wrap(text.lstrip(), 57, break_on_hyphens=False)[:3], [], 0
        for line in lines:  # the second may repeat the first
            end = text.index(line, end) + len(line)
            blocks.append(marks[end - len(line) : end])
        for block, ink in ((blocks, theme.mark), (lines, theme.ink)):
            axes.text(0, top - 0.04, "\n".join(block), color=ink, va="top", family="monospace",
                      size=9, linespacing=1.35)  # fmt: skip
    box = {"boxstyle": "square,pad=0.1", "color": theme.mark}
    axes.text(0, -0.06, "target token", bbox=box, size=8.5, va="top")
