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
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a warning per line of a bad matplotlibrc

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from train.report.runs import Run, compare, scientific
from train.report.texts import finding, moments, percent, pieces, plain


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


def draw(panels: Sequence[str], runs: Sequence[Run], theme: Theme, kind: str) -> bytes:
    """Draw panels, as "png", or as "svg": transparent, for the page's background.

    panels: names of CURVES; or "frontier", R against the perplexity of the samples, alone or with
    "texts", some of the samples, beside it.
    """
    faint = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = STYLE | dict.fromkeys(faint, theme.faint) | {
        "figure.facecolor": theme.ground, "grid.color": theme.grid, "text.color": theme.ink,
    }  # fmt: skip
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    size = {"frontier": (5.8, 4.6), "texts": (11, 5.5)}.get(panels[-1], (5.2 * columns, 3.6 * rows))
    ratios = [11, 10] if panels[-1] == "texts" else None
    with matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no font has
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, width_ratios=ratios, squeeze=False).flat
        for one, panel in zip(axes, panels, strict=True):
            if panel in CURVES:
                _curve(one, panel, runs, theme)
            else:
                {"frontier": _frontier, "texts": _texts}[panel](one, runs, theme)
        if panels[0] in CURVES:  # every run's line, as far as a legend is read
            chosen = sorted({i * (len(runs) - 1) // 9 for i in range(10)})
            lines = [Line2D([], [], color=colours(runs, theme)[i]) for i in chosen]
            labels = [runs[i].label for i in chosen]
            figure.legend(lines, labels, loc="outside upper left", ncols=3 * columns)
        if panels[-1] == "texts":
            title = finding(runs).replace("; ", ";\n")
            figure.suptitle(title, x=0.012, ha="left", size=12, weight="bold")
        figure.savefig(image := io.BytesIO(), format=kind, dpi=200, transparent=kind == "svg",
                       metadata={"Date": None})  # fmt: skip
        return image.getvalue()


def colours(runs: Sequence[Run], theme: Theme) -> list[str]:
    """Return the colour of each run: shades of its family's hue, in the order of the runs."""
    sizes = {family: sum((run.share is None) == family for run in runs) for family in (True, False)}
    found, (low, high) = [], theme.shades
    seen = {True: 0, False: 0}
    for run in runs:
        family = run.share is None
        shade = low + (high - low) * seen[family] / max(sizes[family] - 1, 1)
        seen[family] += 1
        rgba = matplotlib.colormaps["Oranges" if family else "Blues"](shade)
        found.append(matplotlib.colors.to_hex(rgba))
    return found


def thin(values: Sequence[float], buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions and values of the lowest and the highest point of each bucket.

    A picture of a long curve that has as many buckets as pixels looks as with all points.
    """
    ys = np.asarray(values)
    kept = np.flatnonzero(np.isfinite(ys))
    parts = [part for part in np.array_split(kept, buckets) if len(part)]
    ends = [part[[ys[part].argmin(), ys[part].argmax()]] for part in parts]
    positions = np.unique(np.concatenate([kept[:1], *ends, kept[-1:]]))
    return positions, ys[positions]


def _curve(axes: Axes, name: str, runs: Sequence[Run], theme: Theme) -> None:
    axes.set(title=CURVES[name], xlabel="token of the sample" if name == "position" else "step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        steps: Sequence[float] = [*run.evaluations]
        if name == "loss":
            positions, values = thin(run.losses, max(400 // len(runs), 20))
            steps = np.asarray(run.steps)[positions]
        elif name == "r":
            values = [e.r for e in run.evaluations.values()]
        elif name == "perplexity":
            values = [e.sample_perplexity for e in run.evaluations.values()]
        else:  # the mean over 8 positions of all texts: one position of 64 texts is too noisy
            parts = [[text[at : at + 8] for text in run.last_texts] for at in range(0, 64, 8)]
            values = [np.mean([run.share_of(ids) for ids in part if ids]) for part in parts]
            steps = range(4, 68, 8)
        axes.plot(steps, values, "-" if len(values) > 20 else ".-", color=colour)
    if name in ("r", "position"):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    elif axes.dataLim.minposy < math.inf:  # else there is nothing that a log axis can show
        _log_axis(axes)


class _Plain(LogFormatter):
    """Labels of a log axis without mathematics: 0.4, 100,000, 1e6."""

    def __call__(self, y: float, pos: int | None = None) -> str:
        return super().__call__(y, pos) and (f"{y:,g}" if y < 1e6 else scientific(y))


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain())  # 40 within a decade


def _frontier(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Draw the original target's paths, the limit, the runs with a share, and what lies between."""
    axes.set(xlim=(-0.03, 1.03), ymargin=0.1, xlabel="R: share of target tokens in the sampled text")
    axes.set_ylabel("perplexity under the start model:  text  →  noise")
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    label = partial(axes.annotate, textcoords="offset points")
    ends, family = [], "original target, "
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        path = [(e.r, e.sample_perplexity) for e in run.evaluations.values()]
        path = [point for point in path if math.isfinite(point[1])]
        if path and run.share is None:
            axes.plot(*zip(*path, strict=True), ".-", color=colour)
            ends.append((path[-1], run.label, colour))
        elif path:
            axes.errorbar(*path[-1], xerr=run.end.r_error, fmt="o", color=colour, ms=11, zorder=3)
            label(percent(run.share), path[-1], (9, 9), color=colour, weight="bold")
    below = math.inf  # the lowest label so far
    for (x, y), text, colour in sorted(ends, reverse=True, key=lambda end: end[0][1])[:6]:
        below = min(y, below / 4)
        align, shift = ("right", (-4, 7)) if x > 0.8 else ("left", (8, -4))
        label(family + text, (x, below), shift, color=colour, ha=align, weight="bold")
        family = ""  # said once, at the highest
    for first in {run.start: run for run in reversed(runs)}.values():
        before = first.evaluations[min(first.evaluations)]
        limits = [before, *(run.limit for run in runs if run.start == first.start and run.limit)]
        points = sorted((e.r, e.sample_perplexity) for e in limits)
        axes.plot(*zip(*points, strict=True), "--d", color=theme.ink, ms=4, lw=1.4, zorder=4)
        label("start", points[0], (0, -17), color=theme.ink, ha="center")
        if len(points) > 1:
            align, shift = ("right", (0, -30)) if points[-1][0] > 0.6 else ("left", (2, -20))
            label("limit: logit bias at sampling", points[-1], shift, color=theme.ink, ha=align)
    if found := compare(runs):
        run, _, _, high = found
        x, low = run.end.r, run.end.sample_perplexity
        arrow = {"arrowstyle": "<->", "color": theme.ink, "lw": 1.4, "shrinkA": 8, "shrinkB": 2}
        axes.annotate("", (x, high), (x, low), arrowprops=arrow)
        middle = (x, math.sqrt(low) * math.sqrt(high))
        label(f"{plain(high / low, 2)} ×", middle, (8, 0), size=17, weight="bold")
        label("perplexity at the same share", middle, (9, -13), size=9, color=theme.faint)
    if axes.dataLim.minposy < math.inf:
        _log_axis(axes)


def _texts(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Write a heading and three lines of text for each of six moments at most."""
    axes.set_axis_off()
    first, rest = (shown := [moment for moment in moments(runs) if moment.texts])[:5], shown[5:]
    for i, moment in enumerate([*first, *rest[-1:]]):
        top = 1.02 - i / 5.6
        colour = colours(runs, theme)[runs.index(moment.run)] if i else theme.ink
        measured = moment.evaluation
        numbers = f"R {percent(measured.r)}, perplexity {plain(measured.sample_perplexity)}"
        axes.text(0, top, moment.title, color=colour, weight="bold", va="top", size=9.5)
        axes.text(1, top, numbers, color=theme.faint, va="top", ha="right", size=8.5)
        written = pieces(next(iter(moment.texts.values())), moment.run.targets)
        text = "".join(piece.text for piece in written)
        marks = "".join(("█" if piece.target else " ") * len(piece.text) for piece in written)
        lines, blocks, end = textwrap.wrap(text.lstrip(), 57, break_on_hyphens=False)[:3], [], 0
        for line in lines:  # the second may repeat the first
            end = text.index(line, end) + len(line)
            blocks.append(marks[end - len(line) : end])
        for rows, ink in ((blocks, theme.mark), (lines, theme.ink)):
            axes.text(0, top - 0.04, "\n".join(rows), color=ink, va="top", family="monospace",
                      size=9, linespacing=1.35)  # fmt: skip
    label = {"boxstyle": "square,pad=0.1", "color": theme.mark}
    axes.text(0, -0.06, "target token", bbox=label, color=theme.ink, size=8.5, va="top")
