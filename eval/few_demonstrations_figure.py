"""Draw success against learning rate, steps and demonstrations, for each starting point, from search.jsonl.

    python eval/few_demonstrations_figure.py [--results DIR]

Writes search.png into the results folder, which names the points that it shows (their SHA-256).
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import read_lines
from few_demonstrations import OWN_RATES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlafit import files
from vlafit.report.plots import read_literally
from vlafit.score import Score

HERE = Path(__file__).parent
COLOURS = {"full checkpoint": "#0b5f70", "fresh expert": "#b35900", "untrained": "#868e96"}
FEW, NEAR = {"tasks": "faucet"}, {"tasks": "related"}
PANELS = (  # title, what all of its points have, what its axis shows
    ("5 demonstrations, 30 steps", {**FEW, "demonstrations": 5, "steps": 30}, "lr"),
    ("5 demonstrations, own rates", {**FEW, "demonstrations": 5}, "steps"),
    ("30 steps, own rates", {**FEW, "steps": 30}, "demonstrations"),
    ("six related tasks, 5 demonstrations, 60 steps", {**NEAR, "demonstrations": 5, "steps": 60}, "lr"),
)
AXES = {
    "lr": "learning rate",
    "steps": "training steps",
    "demonstrations": "demonstrations of each task",
}


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "few-demonstrations")
    options = parser.parse_args()
    lines = read_lines(options.results / "search.jsonl")
    files.write_atomic(options.results / "search.png", picture(lines))
    return 0


def shown(lines: Sequence[dict[str, Any]], fixed: dict[str, Any], along: str) -> list[dict[str, Any]]:
    """Return the points of a panel: of full fine-tuning, with its fixed values, of the first training seed.

    Along anything but the learning rate, each start has the rate that was fixed for it.
    """
    return [
        line
        for line in lines
        if line["strategy"] == "full"
        and not line["seed"]
        and all(line[key] == value for key, value in fixed.items())
        and (along == "lr" or line["lr"] == OWN_RATES[line["start"]])
    ]


def digest(lines: Sequence[dict[str, Any]]) -> str:
    """Return a hash of all points that the picture shows."""
    points = [shown(lines, fixed, along) for _, fixed, along in PANELS]
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def picture(lines: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG with one panel for each way to look at the points, where there are two places or more."""
    panels = [(title, shown(lines, fixed, along), along) for title, fixed, along in PANELS]
    panels = [panel for panel in panels if len({point[panel[2]] for point in panel[1]}) > 1]
    figure = Figure(figsize=(1.2 + 3.4 * len(panels), 3.8), layout="constrained", facecolor="white")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, points, along) in zip(every, panels, strict=True):
        curves(axes, points, along)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel(AXES[along], fontsize=9)
    every[0].set_ylabel("success, %  (95 % interval)", fontsize=9)
    every[0].set_ylim(0, 100)
    figure.legend(
        *every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    read_literally(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None, "Description": digest(lines)})
    return buffer.getvalue()


def curves(axes: Axes, points: Sequence[dict[str, Any]], along: str) -> None:
    """Draw one curve for each starting point."""
    places = sorted({point[along] for point in points})
    for offset, (start, colour) in zip((-0.06, 0.0, 0.06), COLOURS.items(), strict=True):
        of_start = {point[along]: point for point in points if point["start"] == start}
        xs = [place for place in places if place in of_start]
        scores = [Score(of_start[x]["successes"], of_start[x]["episodes"]) for x in xs]
        at = [places.index(x) + offset for x in xs]
        axes.plot(
            at, [100 * (score.rate or 0) for score in scores], "o-", color=colour, label=start, clip_on=False
        )
        for x, score in zip(at, scores, strict=True):
            axes.plot([x, x], [100 * end for end in score.interval], color=colour, linewidth=1, alpha=0.7)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


if __name__ == "__main__":
    sys.exit(main())
