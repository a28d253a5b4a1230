"""Draw the report's figures for a light or a dark page."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter, MaxNLocator

from train.report.runs import Run
from train.report.samples import Piece, moments, pieces, typical


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


def curves(names: Sequence[str], runs: Sequence[Run], theme: Theme, kind: str) -> bytes:
    """Draw some of CURVES side by side; an SVG is transparent, for the page's background."""
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=(5.6 * len(names), 4), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _curve(axes, name, runs, theme)
        lines = [axes.plot([], [], color=colour)[0] for colour in colours(runs, theme)]
        labels = [_escaped(run.label) for run in runs]
        figure.legend(lines, labels, loc="outside upper left", ncols=5)
        return _saved(figure, kind)


def tradeoff(runs: Sequence[Run], theme: Theme, kind: str) -> bytes:
    """Draw R against the perplexity of the samples; as a PNG, with some text beside it."""
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=(6.2, 4.4) if kind == "svg" else (12, 5.2), layout="constrained")
        columns = (5,) if kind == "svg" else (5, 4)
        axes, *beside = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
        _tradeoff(axes, runs, theme)
        for text_axes in beside:
            _write_texts(text_axes, runs, theme)
        return _saved(figure, kind)


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


def _settings(theme: Theme) -> dict[Any, Any]:  # Any: matplotlib types the keys as 300 literals
    sizes = {f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")}
    return sizes | {
        "axes.axisbelow": True, "axes.facecolor": "none", "axes.grid": True,
        "axes.edgecolor": theme.faint, "axes.labelcolor": theme.faint, "grid.color": theme.grid,
        "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
        "axes.titlesize": 12, "axes.titleweight": "bold", "font.size": 11,
        "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.12,
        "legend.fontsize": 10, "legend.frameon": False, "lines.linewidth": 1.6,
        "figure.facecolor": theme.ground, "text.color": theme.ink,
        "svg.fonttype": "none",  # text in the reader's own font
        "svg.hashsalt": "xfactor",  # the same runs, the same bytes
        "xtick.color": theme.faint, "ytick.color": theme.faint,
    }  # fmt: skip


def _saved(figure: Figure, kind: str) -> bytes:
    image, svg = io.BytesIO(), kind == "svg"
    metadata: Any = {"Date": None} if svg else None
    figure.savefig(image, format=kind, dpi=200, transparent=svg, metadata=metadata)
    return image.getvalue()


def _curve(axes: Axes, name: str, runs: Sequence[Run], theme: Theme) -> None:
    axes.set(title=CURVES[name], xlabel="updates done")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    keys, positive = {}, False
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        for style, meaning, values in _lines(name, run):
            every_step = name in ("loss", "probability")
            updates = range(len(values)) if every_step else [*run.evaluations]
            marker = "" if (every_step and len(values) > 1) or style != "-" else "o"
            axes.plot(updates, values, style, marker=marker, markersize=4, color=colour)
            keys[meaning] = style
            positive = positive or any(0 < value < math.inf for value in values)
    if name in ("probability", "r"):
        axes.set_ylim(-0.03, 1.03)
    elif positive:
        axes.set_yscale("log", nonpositive="mask")
    if len(keys) > 1:
        lines = [axes.plot([], [], style, color=theme.faint)[0] for style in keys.values()]
        axes.legend(lines, keys, loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=3)


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
    ends = []
    for run, colour in zip(runs, colours(runs, theme), strict=True):
        path = [(e.sample_perplexity, e.r, step) for step, e in run.evaluations.items()]
        path = [point for point in path if point[0] < math.inf] or [(1.0, run.after.r, 0)]
        axes.plot([x for x, *_ in path], [y for _, y, _ in path], ".-", color=colour)
        last_x, last_y, _ = path[-1]
        axes.plot(last_x, last_y, "o", color=colour, markersize=8)
        ends.append((last_y, last_x, run, colour))
        if run.predicted_r is not None:
            axes.plot(last_x, run.predicted_r, "o", color=colour, markersize=8, mfc="none")
        labelled = 0.0
        for x, y, step in path:
            if run.tilt is None and labelled + 0.1 < y < last_y - 0.1:
                _label(axes, f"step {step}", x, y, colour, (5, -8), size=9)
                labelled = y
    ends.sort(key=lambda end: end[0])
    above, below = -math.inf, math.inf  # the labels so far: upward on the left, down on the right
    for y, x, run, colour in ends:
        if run.tilt is not None:
            above = max(y, above + 0.06)
            _label(axes, run.label, x, above, colour, (-9, 5), ha="right", weight="bold")
    for y, x, run, colour in reversed(ends):
        if run.tilt is None:
            below = min(y, below - 0.06)
            _label(axes, run.label, x, below, colour, (9, -12), weight="bold")
    starts = [start for run, start in moments(runs) if start is run.before]
    for x, y in [(start.sample_perplexity, start.r) for start in starts]:
        axes.plot(x, y, "D", color=theme.ink, markersize=7)
        _label(axes, "before", x, y, theme.ink, (6, -19), ha="right")
    axes.margins(x=0.16)
    for text, mark, fill in (("before", "D", "full"), ("after", "o", "full"),
                             ("predicted R", "o", "none")):  # fmt: skip
        axes.plot([], [], mark, color=theme.faint, fillstyle=fill, label=text)
    axes.legend(loc="upper left")


def _label(axes: Axes, text: str, x: float, y: float, colour: str, offset: tuple[int, int],
           **style: Any) -> None:  # fmt: skip
    axes.annotate(_escaped(text), (x, y), offset, textcoords="offset points", color=colour, **style)


def _write_texts(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """Write a heading and two lines of text for each of six moments, evenly spread."""
    axes.set_axis_off()
    shown = moments(runs)
    for i, chosen in enumerate(sorted({i * (len(shown) - 1) // 5 for i in range(6)})):
        run, evaluation = shown[chosen]
        top, before = 1 - i / 6, evaluation is run.before
        title = "before" if before else _escaped(f"{run.label}: {run.kind}")
        colour = theme.ink if before else colours(runs, theme)[list(runs).index(run)]
        axes.text(0, top, title, color=colour, weight="bold", va="top")
        axes.text(1, top, f"R {evaluation.r:.1%}", color=theme.faint, va="top", ha="right")
        written = pieces(typical(run, evaluation)[0].ids, run.target_token_ids)
        for characters, ink in zip(_monospaced(written, 54), (theme.mark, theme.ink), strict=True):
            axes.text(0, top - 0.05, characters, color=ink, va="top", family="monospace",
                      size=10, linespacing=1.35, parse_math=False)  # fmt: skip


def _monospaced(written: Sequence[Piece], width: int) -> tuple[str, str]:
    """Return two lines of text twice: blocks where target tokens are, and the characters."""
    font = get_font(findfont("monospace"))
    text = "".join(c if font.get_char_index(ord(c)) else "?" for p in written for c in p.text)
    marks = "".join(("█" if p.target else " ") * len(p.text) for p in written)
    lines, blocks, at = textwrap.wrap(text.lstrip(), width, break_on_hyphens=False)[:2], [], 0
    for line in lines:
        at = text.index(line, at)
        blocks.append(marks[at : at + len(line)])
    return "\n".join(blocks), "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib reads mathematics between two of them
