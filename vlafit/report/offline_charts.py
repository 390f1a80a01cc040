"""Charts of an offline evaluation: error along the chunk, ranks among the draws, curves of joints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlafit.offline.folder import load_parts
from vlafit.offline.numbers import Episode
from vlafit.report import plots
from vlafit.report.markup import Raw, figure

FIRST = 6  # joints that are shown at once; the others unfold
LINES = {
    "policy": ("the policy", plots.LINE, "-"),
    "hold_still": ("hold still", plots.INK, "--"),
    "mean_chunk": ("mean chunk", plots.SECOND, "-."),
}
Result = Mapping[str, Any]


def by_step(result: Result) -> str:
    """Draw the errors at each step of the chunk, the policy's with its interval."""
    figure_, axes = plots.frame("step of the chunk" + (", seconds" if result["hz"] else ""))
    for who, (label, colour, style) in LINES.items():
        values = [(i, mean) for i, mean in enumerate(result["by_step"][who]) if mean is not None]
        if not values:
            continue
        x = _times(result, [i for i, _ in values])
        if who == "policy" and all(mean["low"] is not None for _, mean in values):
            low, high = ([max(0.0, mean[end]) for _, mean in values] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=plots.FAINT, linewidth=0)
        axes.plot(x, [mean["value"] for _, mean in values], style, color=colour, linewidth=1.8, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=plots.INK)
    return plots.svg(figure_, f"offline-steps-{plots.html_id(result['dataset'])}")


def ranks(result: Result) -> str:
    """Draw how often the recorded action has each rank among the draws, beside the calibrated share."""
    shares = np.array(result["calibration"]["ranks"])
    figure_, axes = plots.frame("draws below the recorded action")
    axes.bar(np.arange(len(shares)), 100 * shares, color=plots.LINE, width=0.8)
    axes.axhline(100 / len(shares), color=plots.INK, linewidth=1, linestyle="--")
    axes.set_ylabel("% of the actions", fontsize=9, color=plots.INK)
    figure_.subplots_adjust(left=0.12)
    return plots.svg(figure_, f"offline-ranks-{plots.html_id(result['dataset'])}")


def joints(result: Result, folder: Path, episode: str) -> list[Raw]:
    """Return a chart for each joint of an episode, those that move most first."""
    measured = Episode(episode, load_parts(folder, episode))
    moves = np.nan_to_num(np.nanstd(measured.recorded, axis=(0, 1)))
    deviation = np.array(result["deviation"])
    order = np.argsort(-moves / np.where(deviation > 0, deviation, np.inf), kind="stable")
    return [_joint(result, measured, int(d)) for d in order if deviation[d] > 0 or not deviation.any()]


def _joint(result: Result, measured: Episode, d: int) -> Raw:
    joint = result["joints"][d]
    figure_, axes = plots.frame("seconds" if result["hz"] else "step")
    for i, step in enumerate(measured.steps.tolist()):
        recorded, predicted = measured.recorded[i, :, d], measured.predicted[i, :, :, d]
        real = ~np.isnan(recorded)
        x = np.array(_times(result, (step + np.flatnonzero(real)).tolist()))
        axes.fill_between(
            x,
            predicted.min(axis=0)[real],
            predicted.max(axis=0)[real],
            color=plots.FAINT,
            linewidth=0,
            alpha=0.5,
        )
        axes.plot(x, recorded[real], color=plots.INK, linewidth=1.6)
        axes.plot(x, predicted.mean(axis=0)[real], color=plots.LINE, linewidth=1.2)
    name = f"offline-{plots.html_id(result['dataset'] + measured.name)}-{d}"
    return figure(joint["name"], joint["unit"], plots.svg(figure_, name))


def _times(result: Result, steps: list[int]) -> list[float]:
    return [step / (result["hz"] or 1.0) for step in steps]
