"""Draw the report's figures for a light or a dark page; a user's matplotlib style has no effect."""
# ruff: noqa: E402 (matplotlib reads the two settings when it is imported)

import io
import logging
import math
import os
import textwrap
import warnings
from collections import namedtuple
from collections.abc import Sequence
from functools import partial
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # a notebook's, inherited, makes the import fail
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a bad matplotlibrc warns line by line

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from train.report import finding, percent, pieces, plain, shown
from train.report.runs import Run, compare

Theme = namedtuple("Theme", "ink faint grid ground mark")  # mark: behind target tokens
LIGHT = Theme("#24292f", "#5d6670", "#e4e7ea", "#ffffff", "#ffe3a3")
DARK = Theme("#dfe3e8", "#9aa4af", "#272c33", "#14171b", "#5c4708")
CURVES = {  # the titles, by name
    "loss": "Loss: KL to the target, nats",
    "r": "R: share of target tokens in the samples",
    "perplexity": "Perplexity of the samples under the start model",
    "position": "R by position in the sample, after training",
}
FRONTIER, GRID = [["frontier", "texts"]], [["loss", "r"], ["perplexity", "position"]]
STYLE: dict[Any, Any] = {  # Any: matplotlib types the keys as 300 literals
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.12,
    "font.size": 11, "legend.fontsize": 10, "legend.frameon": False,
    "xtick.major.size": 0, "xtick.minor.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def draw(panels: Any, runs: Sequence[Run], theme: Theme) -> bytes:
    """Return a PNG of rows of panels.

    panels: names of CURVES, or "frontier", R against perplexity, or "texts", some of the samples.
    """
    names = {theme.faint: ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
             theme.grid: ("grid.color",), theme.ink: ("text.color",),
             theme.ground: ("figure.facecolor", "axes.facecolor")}  # fmt: skip
    style = matplotlib.rcParamsDefault | STYLE | {n: c for c, group in names.items() for n in group}
    size = 5.5 * len(panels[0]), 5.5 if "frontier" in panels[0] else 3.6 * len(panels)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no font has
        figure = Figure(figsize=size, layout="constrained")
        for name, axes in figure.subplot_mosaic(panels).items():
            paint = {"frontier": _frontier, "texts": _texts}.get(name, partial(_curve, name))
            paint(axes, runs, theme)
        if "texts" in panels[0]:
            title = finding(runs)[1].replace("; ", ";\n")
            figure.suptitle(title, x=0.012, ha="left", size=12, weight="bold", parse_math=False)
        elif "frontier" not in panels[0]:
            lines, labels = axes.get_legend_handles_labels()
            figure.legend(lines[:9], labels, loc="outside upper left", ncols=3 * len(panels[0]))
        figure.savefig(image := io.BytesIO(), format="png", dpi=200)
        return image.getvalue()


def thin(values: Sequence[float], buckets: int) -> np.ndarray:
    """Return the indices of the lowest and the highest of each bucket of finite values.

    With a bucket per pixel, a long curve looks the same as with all its points.
    """
    ys = np.asarray(values)
    parts = [part for part in np.array_split(np.flatnonzero(np.isfinite(ys)), buckets) if len(part)]
    extremes = [part[choose(ys[part])] for part in parts for choose in (np.argmin, np.argmax)]
    return np.unique(extremes).astype(int)


def _curve(name: str, axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    axes.set(title=CURVES[name], xlabel="token of the sample" if name == "position" else "step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for run in runs:
        steps, ends = np.array([*run.evaluations]), run.evaluations.values()
        if name == "loss":
            steps = thin(run.losses, max(400 // len(runs), 20))
            values = np.asarray(run.losses)[steps]
        elif name == "position":  # means over 8 tokens, as one of 64 texts is too noisy
            texts = [ids for _, ids in run.typical]
            shares = np.array([run.share_of(ids) for ids in zip(*texts, strict=False)])
            values = np.array([part.mean() for part in np.array_split(shares, 8)])
            steps = (np.arange(8) + 0.5) * len(shares) / 8
        else:
            values = np.array([e.r if name == "r" else e.sample_perplexity for e in ends])
        label, style = run.label.replace("$", r"\$"), "-" if len(values) > 20 else ".-"
        axes.plot(steps, values, style, color=run.colour, label=label)
    if name in ("r", "position"):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    else:
        axes.set_yscale("log", nonpositive="mask")


def _frontier(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Draw the paths without a share, the limit, the runs with a share, and the gap between."""
    axes.set(xlim=(-0.03, 1.03), yscale="log", ymargin=0.1)
    axes.set_xlabel("R: share of target tokens in sampled text")
    axes.set_ylabel("perplexity under the start model:  text  →  noise")
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    label = partial(axes.annotate, textcoords="offset points", weight="bold", parse_math=False)
    ends = []
    for run in runs:
        path = [(e.r, e.sample_perplexity) for e in run.evaluations.values()]
        path = [point for point in path if math.isfinite(point[1])]
        if path and run.share is None:
            axes.plot(*zip(*path, strict=True), ".-", color=run.colour)
            ends.append((path[-1], run))
        elif path:
            axes.errorbar(*path[-1], xerr=run.end.r_error, fmt="o", color=run.colour, ms=11)
            label(percent(run.share), path[-1], (8, 10), color=run.colour)
    below, family = math.inf, "original target, "  # height of the last label; prefix of the first
    for (x, y), run in sorted(ends, reverse=True, key=lambda end: end[0][1])[:6]:
        free, below = y < below / 6, min(y, below / 6)
        align, shift = ("right", (-4, 7) if free else (10, -6)) if x > 0.8 else ("left", (8, -4))
        name, family = (family + run.label, "") if run.original else (run.label, family)
        label(name, (x, below), shift, color=run.colour, ha=align)
    limits = [run.limit for run in runs if run.limit.r >= 0]
    points = sorted((e.r, e.sample_perplexity) for e in [shown(runs)[0].end, *limits])
    axes.plot(*zip(*points, strict=True), "--d", color=theme.ink, ms=4, lw=1.4, zorder=4)
    label("start", points[0], (-5, -17), weight="normal")
    if limits:
        align, shift = ("right", (20, -52)) if points[-1][0] > 0.6 else ("left", (2, -20))
        label("limit: logit bias at sampling", points[-1], shift, ha=align, weight="normal")
    if found := compare(runs):
        low, near = found[0].end.sample_perplexity, found[1].evaluations[found[2]]
        high, x = near.sample_perplexity, near.r
        arrow = {"arrowstyle": "<->", "color": theme.ink, "lw": 1.4, "shrinkA": 2, "shrinkB": 8}
        axes.annotate("", (x, low), (x, high), arrowprops=arrow)
        middle, (align, dx) = (x, low**0.4 * high**0.6), ("right", -8) if x > 0.6 else ("left", 8)
        label(f"{plain(high / low, 2)} ×", middle, (dx, 0), size=17, ha=align)  # noqa: RUF001
        text = f"perplexity at {percent(x)}"
        label(text, middle, (dx, -13), size=9, weight="normal", ha=align)


def _texts(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Write a heading and three lines of text for each of six models at most."""
    axes.set_axis_off()
    write = partial(axes.text, va="top", parse_math=False)
    rows = [run for run in shown(runs) if run.typical]
    for i, run in enumerate([*rows[:5], *rows[5:][-1:]]):
        top, colour = 1.02 - i / 5.6, run.colour or theme.ink
        numbers = f"R {percent(run.end.r)}, perplexity {plain(run.end.sample_perplexity)}"
        write(0, top, run.label, color=colour, weight="bold", size=9.5)
        write(1, top, numbers, color=theme.faint, ha="right", size=8.5)
        written = pieces(run, run.typical[0])
        text = "".join(piece for piece, _ in written)
        marks = "".join(("█" if target else " ") * len(piece) for piece, target in written)
        lines, blocks, end = textwrap.wrap(text.lstrip(), 59, break_on_hyphens=False)[:3], [], 0
        for line in lines:  # the second may repeat the first
            end = text.index(line, end) + len(line)
            blocks.append(marks[end - len(line) : end])
        for block, ink in ((blocks, theme.mark), (lines, theme.ink)):
            write(0, top - 0.04, "\n".join(block), color=ink, family="monospace", size=9,
                  linespacing=1.35)  # fmt: skip
    box = {"boxstyle": "square,pad=0.1", "color": theme.mark}
    write(0, -0.06, "target token", bbox=box, size=8.5)
