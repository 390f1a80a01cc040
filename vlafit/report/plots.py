"""Draw curves as inline SVG that follows the page's light or dark colours.

matplotlib draws with marker colours, which are then replaced by CSS variables. Namespaces and metadata are
removed, so that the page contains no links.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from vlafit.report.labels import Box, place
from vlafit.report.logged import Point
from vlafit.score import Score

INK, GRID, LINE, FAINT, SECOND = "#010203", "#020304", "#030405", "#040506", "#050607"
VARIABLES = {INK: "muted", GRID: "grid", LINE: "accent", FAINT: "accent-faint", SECOND: "second"}
SIZE = (5.2, 2.7)  # inches at 72 points: the SVG scales with its column
MARGINS = (0.105, 0.185, 0.85, 0.775)  # left, bottom, width, height, as shares of the figure
LABEL = 8.0  # points
NEIGHBOURS = 10  # logged values on either side whose spread is a noisy curve's band
SMOOTHING = 0.9  # exponential, bias-corrected, of noisy training curves

Axis = Literal["step", "time"]


@dataclass(frozen=True)
class Curve:
    """One line of a chart. A `noisy` curve is drawn smoothed, on the band of its spread."""

    label: str
    points: tuple[Point, ...]
    noisy: bool = False
    second: bool = False  # in the second colour, with markers


@dataclass(frozen=True)
class Mark:
    """A moment of the run, drawn as a labelled vertical line. The value of its point is not used."""

    label: str
    point: Point


def curves(
    name: str, lines: Sequence[Curve], axis: Axis, *, log: bool = False, marks: Sequence[Mark] = ()
) -> str:
    """Plot `lines` against optimiser steps or training minutes; "" if nothing was logged."""
    drawn = [(line, *_xy(line.points, axis)) for line in lines]
    drawn = [(line, x, y) for line, x, y in drawn if len(x)]
    if not drawn:
        return ""
    figure, axes = _figure(axis)
    for line, x, y in drawn:
        if line.noisy and len(x) > 5:
            low, high = _spread(y)
            axes.fill_between(x, low, high, color=FAINT, linewidth=0)
            axes.plot(x, _smooth(y), color=LINE, linewidth=1.8, label=line.label)
        else:
            few = len(x) < 40
            colour = SECOND if line.second else LINE
            axes.plot(
                x, y, color=colour, linewidth=1.8, marker="o" if few else "", markersize=3.5, label=line.label
            )
    lowest = min(float(y.min()) for _, _, y in drawn)
    if log and lowest > 0:
        log_scale(axes)
    elif lowest >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    for mark in marks:
        x, _ = _xy([mark.point], axis)
        if len(x):
            axes.axvline(float(x[0]), color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
            top = axes.get_xaxis_transform()
            axes.text(float(x[0]), 1.0, f" {mark.label}", fontsize=8, color=INK, rotation=90, ha="right",
                      va="top", transform=top)  # fmt: skip
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, name)


def success_curve(name: str, points: Sequence[tuple[int, Score]]) -> str:
    """Plot success in per cent against optimiser steps, with 95 % intervals; `points` are (step, score)."""
    figure, axes = _figure("step")
    x = [step for step, _ in points]
    y = np.array([100 * (score.rate or 0.0) for _, score in points])
    low, high = np.array([[100 * end for end in score.interval] for _, score in points]).T
    errors = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
    axes.errorbar(
        x, y, errors, color=LINE, ecolor=FAINT, elinewidth=2, marker="o", markersize=4, linewidth=1.8
    )
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    return svg(figure, name)


def tick(value: float, _: int | None = None) -> str:
    """Return a short tick label: 0.25, 2.5e-4, 12,000."""
    if 0 < abs(value) < 1e-3:
        return np.format_float_scientific(value, precision=2, trim="-", exp_digits=1).replace(".e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _xy(points: Sequence[Point], axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (p.step if axis == "step" else p.time_s / 60 if p.time_s is not None else None, p.value)
        for p in points
    ]
    kept = [(x, y) for x, y in pairs if x is not None]
    return np.array([x for x, _ in kept], float), np.array([y for _, y in kept], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    smoothed, average = np.empty_like(values), 0.0
    for i, value in enumerate(values):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed[i] = average / (1 - SMOOTHING ** (i + 1))
    return smoothed


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 10 and 90 % quantiles of the values logged around each."""
    around = [values[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1] for i in range(len(values))]
    low, high = np.array([np.quantile(window, (0.1, 0.9)) for window in around]).T
    return low, high


def frame(xlabel: str) -> tuple[Figure, Axes]:
    """Return an empty chart in the page's style; draw with the marker colours, then call `svg`."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes(MARGINS)  # fixed: a layout engine would draw everything twice
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6))  # as many as fit on a phone
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis="x", pad=7)  # below the lowest label of the other axis
    axes.set_xlabel(xlabel, fontsize=9, color=INK, labelpad=2)
    return figure, axes


def _figure(axis: Axis) -> tuple[Figure, Axes]:
    figure, axes = frame("optimiser step" if axis == "step" else "training time, minutes")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis == "step"))
    return figure, axes


def label_points(
    axes: Axes, labels: Sequence[tuple[str, float, float, str]], spans: Sequence[tuple[float, float, float]]
) -> None:
    """Write (text, x, y, colour) beside each point, where it covers no other label, point or vertical span.

    Call it when the limits of the axes are final. `spans` are (x, lowest y, highest y).
    """
    scale = 72 / axes.figure.dpi

    def points(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return float(across) * scale, float(up) * scale

    ends = [(points(x, low), points(x, high)) for x, low, high in spans]
    obstacles = [Box(x, (low + high) / 2, 7.0, max(7.0, high - low)) for (x, low), (_, high) in ends]
    widths = [TextPath((0, 0), text.replace("$", "S"), size=LABEL).get_extents().width for text, *_ in labels]
    bounds = axes.bbox
    frame = Box(
        scale * (bounds.x0 + bounds.width / 2), scale * (bounds.y0 + bounds.height / 2),
        scale * bounds.width, scale * bounds.height,
    )  # fmt: skip
    anchors = [points(x, y) for _, x, y, _ in labels]
    # The page's font is the reader's, and may be wider than the one that is measured here.
    boxes = place(anchors, [(1.25 * width + 4, 1.5 * LABEL) for width in widths], obstacles, frame)
    for (text, x, y, colour), (anchor, box) in zip(labels, zip(anchors, boxes, strict=True), strict=True):
        offset = (box.x - anchor[0], box.y - anchor[1])
        far = max(abs(offset[0]) - box.width / 2, abs(offset[1]) - box.height / 2) > 12
        axes.annotate(
            text, (x, y), offset, textcoords="offset points", ha="center", va="center", fontsize=LABEL,
            color=colour, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far else None,
        )  # fmt: skip


def log_scale(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic, with few and short tick labels."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(tick))
    axis.set_minor_formatter(NullFormatter())


def html_id(name: str) -> str:
    """Return a metric's or set's name as part of an HTML id."""
    return "".join(c if c.isalnum() else "-" for c in name)


def read_literally(figure: Figure) -> None:
    """Let no dollar sign in a name or an instruction begin a formula, which may not be one.

    Labels of ticks are written later, when the figure is drawn.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_text():
            text.set_parse_math(False)


def svg(figure: Figure, name: str, variables: Mapping[str, str] = VARIABLES) -> str:
    """Return the figure as an <svg> element; `name` makes its ids unique in the page.

    `variables` maps marker colours to the CSS variables that replace them.
    """
    buffer = io.StringIO()
    read_literally(figure)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px inherit", text)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    for marker, variable in variables.items():
        text = text.replace(marker, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()
