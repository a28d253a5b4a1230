"""Axes that read without a legend: each line labelled where it ends, ticks in plain numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

LABEL_GAP = 0.085  # least distance of two labels at the right margin, as a share of the height


class Line(NamedTuple):
    """One labelled line of a figure."""

    label: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "-"  # only solid lines carry their label


def over_updates(axes: Axes, title: str, lines: Sequence[Line], key: str = "") -> None:
    """Plot, label each solid line at its end, and say in `key` what the others are."""
    for line in lines:
        marker = "o" if len(line.xs) < 3 else ""
        width = 1.8 if line.style == "-" else 1.3
        axes.plot(
            line.xs,
            line.ys,
            line.style,
            color=line.colour,
            linewidth=width,
            marker=marker,
            markersize=4,
        )
    if axes.get_yscale() == "log":
        log_ticks(axes.yaxis)
    axes.set_xlabel("updates done")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    write_title(axes, title, key)
    label_ends(axes, [line for line in lines if line.style == "-"])


def write_title(axes: Axes, title: str, key: str) -> None:
    """A bold line above the axes, and below it `key`, one line or two, in the axes' colour."""
    height = 1.03
    if key:
        axes.text(
            0,
            height,
            key,
            transform=axes.transAxes,
            fontsize=10,
            color=axes.xaxis.label.get_color(),
        )
        height += 0.075 * (1 + key.count("\n"))
    axes.text(0, height, title, transform=axes.transAxes, fontsize=12, weight="bold")


def label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each label beside the line's last point, moved where it would cover another."""
    to_share = axes.transData + axes.transAxes.inverted()
    (_, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    wanted = []
    for line in lines:
        last = min(max(low, line.ys[-1]), high)  # a loss of 0, an infinite perplexity: at the edge
        wanted.append(to_share.transform((right, last))[1])
    order = sorted(range(len(lines)), key=lambda i: wanted[i])
    heights, floor = {}, -math.inf
    for i in order:
        heights[i] = floor = max(wanted[i], floor + LABEL_GAP)
    ceiling = 1.0
    for i in reversed(order):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - LABEL_GAP
        axes.text(
            1.02,
            heights[i],
            lines[i].label,
            transform=axes.transAxes,
            color=lines[i].colour,
            verticalalignment="center",
        )


def _plain(value: float, position: int | None = None) -> str:
    """0.01, 2,000, 10⁶."""
    mantissa, exponent = f"{value:e}".split("e")
    if int(exponent) < 5:
        return f"{value:,.6g}"
    power = "10" + str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def log_ticks(axis: Axis) -> None:
    """Plain numbers, as many as the range has room for."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades > 0.7:
        subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
