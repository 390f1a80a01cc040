"""Draw a comparison's plots as inline SVG: loss against steps, samples and time; success against memory."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from vlafit.compare.standing import Standing
from vlafit.report import plots

Axis = Literal["step", "samples", "time"]
LABELS: dict[Axis, str] = {
    "step": "optimiser step",
    "samples": "training samples",
    "time": "training time, minutes",
}
# One colour per strategy, for light and dark pages; after the last colour they repeat with dashed lines.
COLOURS = (
    ("#0b7285", "#4fb3c6"), ("#b35900", "#e89a4a"), ("#6741d9", "#a58bff"), ("#2b8a3e", "#69c07a"),
    ("#c2255c", "#f783ac"), ("#1864ab", "#74b0f0"), ("#846a00", "#d4b73a"), ("#862e9c", "#d08ae0"),
    ("#495057", "#adb5bd"), ("#d9480f", "#ff922b"),
)  # fmt: skip
LABEL_ROWS = (3, 11, 19, 27)  # percent
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


def losses(standings: Sequence[Standing], name: str, axis: Axis) -> str:
    """Plot the validation loss on a set against steps, samples or minutes, one line per seed."""
    figure, axes = plots.frame(LABELS[axis])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis != "time"))
    lowest: float | None = None
    for index, standing in enumerate(standings):
        colour, dashes = list(MARKERS)[index % len(COLOURS)], ("-", "--")[index // len(COLOURS) % 2]
        for figures in standing.figures:
            points = figures.validation.get(name, ())
            x = [{"step": p.step, "samples": p.samples, "time": p.seconds / 60}[axis] for p in points]
            y = [p.loss for p in points]
            lowest = min([*y, *([] if lowest is None else [lowest])]) if y else lowest
            axes.plot(x, y, dashes, color=colour, linewidth=1.4, marker="o", markersize=2.5)
    if lowest is None:
        return ""
    if lowest > 0:
        plots.log_scale(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(plots.tick))
    return plots.svg(figure, f"loss-{plots.html_id(name)}-{axis}", VARIABLES)


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
    for index, standing, peak, rate in drawn:
        low, high = standing.interval
        spread = [[100 * max(0.0, rate - low)], [100 * max(0.0, high - rate)]]
        colour = list(MARKERS)[index % len(COLOURS)]
        axes.errorbar(
            [peak / 1e6], [100 * rate], spread, color=colour, elinewidth=1.6, marker="o", markersize=5
        )
    axes.set_ylim(-3, 103)
    axes.margins(x=0.18)
    high_up = sum(rate for *_, rate in drawn) > len(drawn) / 2
    for row, (index, standing, peak, _) in enumerate(sorted(drawn, key=lambda point: point[2])):
        # Points of similar strategies overlap, so labels are placed apart, in the emptier half of the chart.
        height = LABEL_ROWS[row % len(LABEL_ROWS)]
        height = height if high_up else 100 - height
        _label(axes, standing.strategy, peak / 1e6, height, list(MARKERS)[index % len(COLOURS)])
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(plots.tick))
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
    return plots.svg(figure, "success-memory", VARIABLES)


def _label(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    """Write a strategy's name at a height in percent, above or below its point."""
    axes.annotate(text, (x, y), ha="center", va="center", fontsize=8, color=colour)
