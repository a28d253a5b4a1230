"""Draw the report's figures for a light or a dark page."""

import io
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from train.report.runs import Run
from train.report.samples import moments, pieces, typical


class Theme(NamedTuple):
    """Colours of a page; oranges are runs of the original target, blues those with a tilt."""

    ink: str
    faint: str
    grid: str
    ground: str
    mark: str  # behind target tokens
    shades: tuple[float, float]  # of matplotlib's Oranges and Blues, first run to last


LIGHT = Theme("#24292f", "#5d6670", "#e4e7ea", "#ffffff", "#ffe3a3", (0.5, 0.9))
DARK = Theme("#dfe3e8", "#9aa4af", "#272c33", "#14171b", "#5c4708", (0.65, 0.35))
CURVES = {  # the titles, by name
    "loss": "Loss: KL to the target, nats",
    "probability": "Probability on the target tokens",
    "r": "R: share of target tokens in sampled text",
    "perplexity": "Perplexity",
}
STYLE: dict[Any, Any] = {  # Any: matplotlib types the keys as 300 literals
    "axes.axisbelow": True, "axes.facecolor": "none", "axes.grid": True,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
    "axes.titlesize": 12, "axes.titleweight": "bold", "font.size": 11,
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.12,
    "legend.fontsize": 10, "legend.frameon": False, "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text in the reader's own font
    "svg.hashsalt": "xfactor",  # the same runs, the same bytes
    "xtick.major.size": 0, "xtick.minor.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def draw(panels: Sequence[str], runs: Sequence[Run], theme: Theme, kind: str) -> bytes:
    """Draw panels side by side, as "png", or as "svg": transparent, for the page's background.

    panels: names of CURVES; or "tradeoff", R against the perplexity of the samples, alone or with
    "texts", some of the samples, beside it.
    """
    faint = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = STYLE | dict.fromkeys(faint, theme.faint) | {
        "figure.facecolor": theme.ground, "grid.color": theme.grid, "text.color": theme.ink,
    }  # fmt: skip
    size = {"tradeoff": (6.2, 4.4), "texts": (12, 5.2)}.get(panels[-1], (5.6 * len(panels), 4))
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        ratios = [4 if panel == "texts" else 5 for panel in panels]
        row = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            paint = {"tradeoff": _tradeoff, "texts": _texts}.get(panel, partial(_curve, panel))
            paint(axes, runs, theme)
        if panels[0] in CURVES:
            lines = [Line2D([], [], color=colour) for colour in colours(runs, theme)]
            labels = [_escaped(run.label) for run in runs]
            figure.legend(lines, labels, loc="outside upper left", ncols=5)
        figure.savefig(image := io.BytesIO(), format=kind, dpi=200, transparent=kind == "svg",
                       metadata={"Date": None})  # fmt: skip
        return image.getvalue()


def colours(runs: Sequence[Run], theme: Theme) -> list[str]:
    """Return the colour of each run: shades of its family's hue, in the order of the runs."""
    found = []
    for run in runs:
        family = [other for other in runs if (other.tilt is None) == (run.tilt is None)]
        low, high = theme.shades
        shade = low + (high - low) * family.index(run) / max(len(family) - 1, 1)
        rgba = matplotlib.colormaps["Oranges" if run.tilt is None else "Blues"](shade)
        found.append(matplotlib.colors.to_hex(rgba))
    return found


def _curve(name: str, axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    axes.set(title=CURVES[name], xlabel="updates done")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    styles = {}
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        for style, meaning, values in _lines(name, run):
            every_step = name in ("loss", "probability")
            updates = range(len(values)) if every_step else [*run.evaluations]
            marker = "o" if style == "-" and (len(values) == 1 or not every_step) else ""
            axes.plot(updates, values, style, marker=marker, markersize=4, color=colour)
            styles[meaning] = style
    if name in ("probability", "r"):
        axes.set_ylim(-0.03, 1.03)
    elif axes.dataLim.minposy < math.inf:  # else there is nothing that a log axis can show
        axes.set_yscale("log", nonpositive="mask")
    if len(styles) > 1:
        lines = [Line2D([], [], ls=style, color=theme.faint) for style in styles.values()]
        axes.legend(lines, styles, loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=3)


def _lines(name: str, run: Run) -> list[tuple[str, str, Sequence[float]]]:
    """Return a run's lines in one of CURVES: style, meaning, values."""
    found, losses = run.evaluations.values(), [step.loss for step in run.steps]
    if name == "loss":
        return [("-", "", losses)]
    if name == "r":
        top_k = [e.r_top_k for e in found]
        return [("-", "untruncated", [e.r for e in found]), ("--", "top-k", top_k)]
    if name == "perplexity":
        samples = [e.sample_perplexity for e in found]
        passage = [e.passage_perplexity for e in found]
        return [("-", "samples, start model", samples), ("--", "passage, this model", passage)]
    bound = [math.exp(-max(loss, 0)) for loss in losses]
    model = ("-", "model", [step.target_probability for step in run.steps])
    if run.tilt is not None:
        predicted = [step.predicted_probability for step in run.steps]
        return [model, ("--", "tilted teacher", predicted)]
    return [model] if run.beta else [model, (":", "lower bound exp(-KL)", bound)]


def _tradeoff(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    axes.set(xscale="log", ylim=(-0.11, 1.05), title="Target tokens gained, text lost")
    axes.set_ylabel("R: share of target tokens in sampled text")
    axes.xaxis.set_minor_formatter(LogFormatter())  # 40, not 4 x 10^1, within a decade
    axes.set_xlabel("perplexity of the samples under the start model:  text  →  noise")
    label = partial(axes.annotate, textcoords="offset points")
    ends = []
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        path = [(e.sample_perplexity, e.r, step) for step, e in run.evaluations.items()]
        path = [point for point in path if point[0] < math.inf] or [(1.0, run.after.r, 0)]
        xs, ys, _ = zip(*path, strict=True)
        axes.plot(xs, ys, ".-", color=colour)
        axes.plot(xs[-1], ys[-1], "o", color=colour, markersize=8)
        ends.append((ys[-1], xs[-1], run, colour))
        if run.predicted_r is not None:
            axes.plot(xs[-1], run.predicted_r, "o", color=colour, markersize=8, mfc="none")
        labelled = 0.0
        for x, y, step in path:
            if run.tilt is None and labelled + 0.1 < y < ys[-1] - 0.1:
                label(f"step {step}", (x, y), (5, -8), color=colour, size=9)
                labelled = y
    ends.sort(key=lambda end: end[0])
    above, below = -math.inf, math.inf  # the labels so far: upward on the left, down on the right
    for y, x, run, colour in ends:
        if run.tilt is not None:
            above = max(y, above + 0.06)
            label(_escaped(run.label), (x, above), (-9, 5), color=colour, ha="right", weight="bold")
    for y, x, run, colour in reversed(ends):
        if run.tilt is None:
            below = min(y, below - 0.06)
            label(_escaped(run.label), (x, below), (9, -12), color=colour, weight="bold")
    for run, evaluation in moments(runs):
        if evaluation is run.before:
            x, y = evaluation.sample_perplexity, evaluation.r
            axes.plot(x, y, "D", color=theme.ink, markersize=7)
            label("before", (x, y), (6, -19), color=theme.ink, ha="right")
    axes.margins(x=0.16)
    for text, mark, fill in (("before", "D", "full"), ("after", "o", "full"),
                             ("predicted R", "o", "none")):  # fmt: skip
        axes.plot([], [], mark, color=theme.faint, fillstyle=fill, label=text)
    axes.legend(loc="upper left")


def _texts(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Write a heading and two lines of text for each of six moments, evenly spread."""
    axes.set_axis_off()
    shown, font = moments(runs), get_font(findfont("monospace"))
    for i, chosen in enumerate(sorted({i * (len(shown) - 1) // 5 for i in range(6)})):
        run, evaluation = shown[chosen]
        top, before = 1 - i / 6, evaluation is run.before
        title = "before" if before else _escaped(f"{run.label}: {run.kind}")
        colour = theme.ink if before else colours(runs, theme)[runs.index(run)]
        axes.text(0, top, title, color=colour, weight="bold", va="top")
        axes.text(1, top, f"R {evaluation.r:.1%}", color=theme.faint, va="top", ha="right")
        written = pieces(typical(run, evaluation)[0].ids, run.target_token_ids)
        text = "".join(c if font.get_char_index(ord(c)) else "?" for p in written for c in p.text)
        marks = "".join(("█" if p.target else " ") * len(p.text) for p in written)
        lines, blocks, end = textwrap.wrap(text.lstrip(), 54, break_on_hyphens=False)[:2], [], 0
        for line in lines:  # the second may repeat the first
            end = text.index(line, end) + len(line)
            blocks.append(marks[end - len(line) : end])
        for rows, ink in ((blocks, theme.mark), (lines, theme.ink)):
            axes.text(0, top - 0.05, "\n".join(rows), color=ink, va="top", family="monospace",
                      size=10, linespacing=1.35, parse_math=False)  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib reads mathematics between two of them
