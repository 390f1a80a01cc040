"""Draw a comparison's plots as inline SVG: loss against steps, samples and time; success against memory."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from vlafit.compare.arm_record import ValidationPoint
from vlafit.compare.standing import Standing
from vlafit.report import plots

Axis = Literal["step", "samples", "time"]
LABELS: dict[Axis, str] = {
    "step": "optimiser step",
    "samples": "training samples",
    "time": "training time, minutes",
}
# One colour per strategy, for light and dark pages; then they repeat with dashes. Any two differ by 30 in
# CIELAB, also for people who confuse red and green or blue and yellow (tests/report/test_colours.py).
COLOURS = (
    ("#0b7285", "#4fb3c6"), ("#d9480f", "#f08c4a"), ("#a817e6", "#953cee"), ("#9c8e6d", "#c2ffb2"),
    ("#220535", "#eeee18"), ("#610a0a", "#de1666"),
)  # fmt: skip
MARKS = "osD^vP"  # shapes of points: strategies differ by more than their colour
MARKERS = {f"#0a0b{i:02x}": f"s{i}" for i in range(len(COLOURS))}
VARIABLES = {**plots.VARIABLES, **MARKERS}


def style() -> str:
    """Return the CSS that gives each strategy its colour."""
    light = " ".join(f"--s{i}: {colour};" for i, (colour, _) in enumerate(COLOURS))
    dark = " ".join(f"--s{i}: {colour};" for i, (_, colour) in enumerate(COLOURS))
    chips = "\n".join(f".tone-s{i} {{ --tone: var(--s{i}); }}" for i in range(len(COLOURS)))
    return (
        f"\n:root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{chips}\n"
        ".legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; font-size: 14px; }\n"
        ".legend span::before { content: ''; display: inline-block; width: 14px; height: 4px;\n"
        "  margin-right: 7px;"
        "  vertical-align: middle; background: var(--tone); border-radius: 2px; }\n"
    )


def tone(index: int) -> str:
    """Return the CSS colour name of the strategy at a position."""
    return f"s{index % len(COLOURS)}"


def look(index: int) -> tuple[str, str, str]:
    """Return the marker colour, the line style and the marker of the strategy at a position."""
    lap = index // len(COLOURS)
    return list(MARKERS)[index % len(COLOURS)], ("-", "--", ":")[lap % 3], MARKS[index % len(MARKS)]


def losses(standings: Sequence[Standing], name: str, axis: Axis) -> str:
    """Plot the validation loss on a set against steps, samples or minutes.

    One line per strategy: the mean of its seeds, on a band from the lowest to the highest.
    """
    figure, axes = plots.frame(LABELS[axis])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis != "time"))
    lowest: float | None = None
    for index, standing in enumerate(standings):
        seeds = [points for figures in standing.figures if (points := figures.validation.get(name, ()))]
        x, y = _grid(seeds, axis)
        if not y.size:
            continue
        lowest = min(float(y.min()), float("inf") if lowest is None else lowest)
        colour, dashes, marker = look(index)
        if len(y) > 1:
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y.mean(axis=0), dashes, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
    if lowest is None:
        return ""
    if lowest > 0:
        plots.log_scale(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(plots.tick))
    axes.xaxis.set_major_formatter(FuncFormatter(plots.tick))
    return plots.svg(figure, f"loss-{plots.html_id(name)}-{axis}", VARIABLES)


def _grid(seeds: Sequence[Sequence[ValidationPoint]], axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the places on the x axis [points] and the losses [seeds, points], at the steps of all seeds."""
    by_step = [{point.step: point for point in points} for points in seeds]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    rows = [[points[step] for step in steps] for points in by_step]
    places = [
        [{"step": p.step, "samples": p.samples, "time": p.seconds / 60}[axis] for p in row] for row in rows
    ]
    y = np.array([[point.loss for point in row] for row in rows], float)
    return (np.array(places, float).mean(axis=0) if y.size else np.zeros(0)), y


def success_against_memory(standings: Sequence[Standing]) -> str:
    """Plot success with its 95 % interval against peak memory, one point per strategy; "" without both."""
    drawn = [
        (i, standing, standing.peak, pooled.rate)
        for i, standing in enumerate(standings)
        if standing.peak is not None and (pooled := standing.pooled()) is not None and pooled.rate is not None
    ]
    if not drawn:
        return ""
    figure, axes = plots.frame("peak memory, MB")
    labels, spans = [], []
    for index, standing, peak, rate in drawn:
        low, high = (100 * end for end in standing.interval)
        spread = [[max(0.0, 100 * rate - low)], [max(0.0, high - 100 * rate)]]
        colour, marker = look(index)[0], look(index)[2]
        axes.errorbar(
            [peak / 1e6], [100 * rate], spread, color=colour, elinewidth=1.6, marker=marker, markersize=5
        )
        labels.append((standing.strategy, peak / 1e6, 100 * rate, colour))
        spans.append((peak / 1e6, low, high))
    axes.set_ylim(-3, 103)
    axes.margins(x=0.18)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(plots.tick))
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
    plots.label_points(axes, labels, spans)
    return plots.svg(figure, "success-memory", VARIABLES)
