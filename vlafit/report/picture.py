"""Draw results as PNG pictures: `result_figure` shows one run, `ablation_figure` compares arms over seeds."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlafit.errors import VlafitError, brief
from vlafit.files import parse_json, plain_text
from vlafit.report.facts import AFTER, BEFORE, WRONG, Evaluation, Facts
from vlafit.report.films import separated
from vlafit.report.plots import read_literally
from vlafit.rollout.records import Record
from vlafit.score import Score, overall

INK, MUTED, GRID = "#1c2024", "#667078", "#e3e6e8"
COLOURS = {BEFORE: "#868e96", AFTER: "#0b5f70", WRONG: "#b35900"}
NAMES = {BEFORE: "before", AFTER: "after", WRONG: "after,\nwrong instruction"}
DOTS_PER_INCH = 160
LONGEST_TITLE = 100  # characters of a title that lists tasks
LONGEST_QUOTE = 80  # characters of an instruction
SMALLEST = 7.0  # points of a text
MARGIN = 6.0  # pixels


@dataclass(frozen=True)
class Arm:
    """One kind of run in a comparison: its label, and the score of each seed."""

    label: str
    scores: tuple[Score, ...]


def read_scores(report: Path) -> dict[str, Score]:
    """Return the scores by evaluation name from a report.json or a run folder that holds one.

    Raises VlafitError if the file is missing or is not a report.
    """
    path = report / "report.json" if report.is_dir() else report
    try:
        success = parse_json(plain_text(path))["success"]
        return {
            name: Score(int(counts["successes"]), int(counts["episodes"]), int(counts["errors"]))
            for name, counts in success.items()
        }
    except OSError as error:
        raise VlafitError(
            f"cannot read {path}: {error.strerror or error}; write it with `vlafit report RUN`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlafitError(
            f"{path} is not a report ({brief(error)}); write it again with `vlafit report RUN`"
        ) from error


def result_figure(facts: Facts) -> bytes:
    """Return a PNG of a run: success with intervals, and film strips of one start if it was filmed."""
    shown = [facts.evaluations[n] for n in NAMES if n in facts.evaluations] or list(
        facts.evaluations.values()
    )[-1:]
    if not shown:
        raise VlafitError(f"{facts.folder} has no finished evaluation to draw; evaluate first")
    strips = _strips(shown)
    figure = Figure(figsize=(11, 3.7) if strips else (5, 3.4), layout="constrained", facecolor="white")
    grid = (
        figure.add_gridspec(max(1, len(strips)), 2, width_ratios=(1, 2.15))
        if strips
        else figure.add_gridspec(1, 1)
    )
    axes = figure.add_subplot(grid[:, 0])
    _bars(
        axes, [NAMES.get(e.name, e.name) for e in shown], [e.overall for e in shown], [e.name for e in shown]
    )
    for row, (evaluation, record) in enumerate(strips):
        _strip(figure.add_subplot(grid[row, 1]), evaluation, record)
    names = facts.evaluations[shown[0].name].tasks
    tasks = ", ".join(names)
    if len(tasks) > LONGEST_TITLE:
        tasks = f"{len(names)} tasks"
    figure.suptitle(f"{facts.recipe.name}: {tasks}", fontsize=11, color=INK, x=0.01, ha="left")
    return _png(figure)


def ablation_figure(arms: Sequence[Arm], title: str = "") -> bytes:
    """Return a PNG that compares arms: each seed's success with its interval, all episodes as a bar."""
    if not arms or not all(arm.scores for arm in arms):
        raise VlafitError("a comparison needs at least one arm, and each arm at least one finished run")
    figure = Figure(figsize=(7.5, 0.7 + 0.75 * len(arms)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for row, arm in enumerate(arms):
        pooled = overall({str(i): score for i, score in enumerate(arm.scores)})
        colour = COLOURS[AFTER] if row == 0 else COLOURS[BEFORE]
        axes.barh(row, 100 * (pooled.rate or 0), height=0.62, color=colour, alpha=0.25)
        offsets = np.linspace(-0.2, 0.2, len(arm.scores)) if len(arm.scores) > 1 else [0.0]
        for offset, score in zip(offsets, arm.scores, strict=True):
            low, high = (100 * end for end in score.interval)
            axes.plot(
                [low, high],
                [row + offset] * 2,
                color=colour,
                linewidth=1.6,
                solid_capstyle="round",
                clip_on=False,
            )
            if score.rate is not None:
                axes.plot(100 * score.rate, row + offset, "o", color=colour, markersize=5, clip_on=False)
        text = "–" if pooled.rate is None else f"{100 * pooled.rate:.0f} %"
        seeds = f"{len(arm.scores)} seed{'s' if len(arm.scores) > 1 else ''}"
        note = f"{text}   {pooled.successes}/{pooled.episodes}, {seeds}" + (
            f", {pooled.errors} error{'s' if pooled.errors > 1 else ''}" if pooled.errors else ""
        )
        axes.text(103, row, note, va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=10, color=INK)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(
        "success after fine-tuning, %  (dots: seeds, with 95 % intervals; bars: all episodes)", fontsize=9
    )
    _clean(axes, "x")
    if title:
        axes.set_title(title, fontsize=11, color=INK, loc="left")
    return _png(figure)


def _bars(axes: Axes, labels: Sequence[str], scores: Sequence[Score], names: Sequence[str]) -> None:
    for x, (score, name) in enumerate(zip(scores, names, strict=True)):
        rate, (low, high) = 100 * (score.rate or 0), (100 * end for end in score.interval)
        axes.bar(x, rate, width=0.62, color=COLOURS.get(name, COLOURS[AFTER]))
        axes.plot([x, x], [low, high], color=INK, linewidth=1.3)
        rate_text = "–" if score.rate is None else f"{rate:.0f} %"
        axes.text(
            x,
            max(high, rate) + 2.5,
            rate_text,
            ha="center",
            va="bottom",
            fontsize=12,
            color=INK,
            weight="bold",
        )
    counts = [f"{label}\n{s.successes}/{s.episodes}" for label, s in zip(labels, scores, strict=True)]
    axes.set_xticks(range(len(labels)), counts, fontsize=9, color=INK)
    axes.set_ylim(0, 118)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("success, %  (95 % interval)", fontsize=9, color=MUTED)
    _clean(axes, "y")


def _clean(axes: Axes, grid: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _strips(shown: Sequence[Evaluation]) -> list[tuple[Evaluation, Record]]:
    """Choose one filmed start for all evaluations, preferably one that failed before and succeeded after."""
    wanted = {BEFORE: False, AFTER: True, WRONG: False}
    films = {(r.task, r.seed): 0 for e in shown for r in e.filmed}
    for evaluation in shown:
        for record in evaluation.filmed:
            films[record.task, record.seed] += record.success is wanted.get(evaluation.name, True)
    start = max(films, key=lambda s: films[s], default=None)  # the first with the best count
    return [(e, r) for e in shown for r in e.filmed if (r.task, r.seed) == start]


def _strip(axes: Axes, evaluation: Evaluation, record: Record) -> None:
    with Image.open(io.BytesIO(separated(evaluation.strip(record)))) as picture:
        axes.imshow(np.asarray(picture), interpolation="none")
    axes.set_axis_off()
    outcome = {True: "success", False: "failure", None: "error"}[record.success]
    name = NAMES.get(evaluation.name, evaluation.name).replace("\n", " ")
    said = record.instruction
    said = said if len(said) <= LONGEST_QUOTE else f"{said[:LONGEST_QUOTE]}…"  # the layout fails on more
    text = f"{name}: “{said}”: {outcome} after {record.steps} steps"
    axes.set_title(text, fontsize=9.5, color=COLOURS.get(evaluation.name, INK), loc="left", pad=4)


def fit_texts(figure: Figure) -> None:
    """Make texts that leave the picture on the right smaller, and cut those that are then still too long."""
    figure.draw_without_rendering()
    right = figure.bbox.width - MARGIN
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not text.get_visible() or not text.get_text().strip():
            continue
        points = float(text.get_fontsize())
        while text.get_window_extent().x1 > right and points > SMALLEST:
            points = max(SMALLEST, points - 0.25)
            text.set_fontsize(points)
        while text.get_window_extent().x1 > right and len(text.get_text()) > 1:
            text.set_text(f"{text.get_text().removesuffix('…')[:-1]}…")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    read_literally(figure)
    fit_texts(figure)
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
