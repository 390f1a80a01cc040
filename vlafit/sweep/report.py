"""The report of a sweep: one self-contained page, one JSON, and the best trial's recipe to train again."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from vlafit import files
from vlafit.report import plots
from vlafit.report.markup import Content, Raw, figure, join, muted, section, table, tag
from vlafit.report.page import document, notices
from vlafit.sweep.storage import ERROR, FOLDER, RETRY_OF, Storage, begun, values_of
from vlafit.sweep.study import prepare
from vlafit.sweep.work import Sweep, losses

FORMAT = 1
STATES = {
    "COMPLETE": "whole",
    "PRUNED": "pruned",
    "FAIL": "broke",
    "RUNNING": "running",
    "WAITING": "waiting",
}


@dataclass(frozen=True)
class Trial:
    """One trial, as it is reported."""

    number: int
    state: str
    """whole, pruned, broke, running or waiting."""
    values: dict[str, object]
    loss: float | None
    """Last validation loss: of a whole trial what it is judged by, of a pruned one where it ended."""
    folder: str
    """The run's folder, relative to the sweep's."""
    error: str
    retry_of: int | None
    curve: tuple[tuple[int, float], ...]
    """(step, validation loss), from step 0 on."""


@dataclass(frozen=True)
class Found:
    """What a sweep came to."""

    sweep: Sweep
    trials: tuple[Trial, ...]
    command: str = ""

    @property
    def best(self) -> Trial | None:
        """The whole trial of the lowest last validation loss."""
        whole = [t for t in self.trials if t.state == "whole" and t.loss is not None]
        return min(whole, key=lambda t: t.loss or 0.0, default=None)

    @property
    def broken(self) -> dict[int, str]:
        """Why trials broke, by their numbers."""
        return {t.number: t.error for t in self.trials if t.state == "broke"}

    def train_again(self) -> str:
        """Return the command that trains the best trial again, with the rollouts that the recipe asks for."""
        folder, name = self.sweep.folder, f"{self.sweep.recipe.name}-best"
        return f"vlafit train {folder / 'best' / 'recipe.toml'} --out runs/{name}" if self.best else ""

    def notes(self) -> list[str]:
        """Return what a reader must know before believing the best."""
        said = []
        wanted, ended = (
            self.sweep.study.trials,
            sum(t.state in ("whole", "pruned", "broke") for t in self.trials),
        )
        if ended < wanted:
            said.append(f"{ended} of {wanted} trials have ended; the same command goes on.")
        if self.broken and self.best is None:
            said.append(f"No trial came to its end: {len(self.broken)} broke, so there is no best.")
            return said
        if self.best is not None:
            for name, one in self.sweep.study.search.items():
                if one.at_edge(self.best.values.get(name)):
                    said.append(
                        f"The best {name} lies at the edge of what was searched; a better one may lie beyond."
                    )
        said.append(
            "One seed a trial, judged by validation loss: confirm the best by rollouts and more seeds."
        )
        return said


def read(sweep: Sweep, command: str = "") -> Found:
    """Read what the study's storage and the trials' folders hold."""
    trials = []
    everything = Storage(sweep.folder, sweep.study, sweep.recipe.train.steps).trials()
    for one in begun(everything):
        named = str(one.user_attrs.get(FOLDER, ""))
        run = sweep.folder / "trials" / named / "run"
        curve = tuple(losses(run)) if named else ()
        trials.append(
            Trial(
                number=one.number,
                state=STATES[one.state.name],
                values=values_of(one.params, sweep.study),
                loss=curve[-1][1] if curve and one.state.name in ("COMPLETE", "PRUNED") else None,
                folder=str(run.relative_to(sweep.folder)) if named else "",
                error=str(one.user_attrs.get(ERROR, "the worker died" if one.state.name == "FAIL" else "")),
                retry_of=one.user_attrs.get(RETRY_OF),
                curve=curve,
            )
        )
    return Found(sweep, tuple(trials), command)


def write(found: Found) -> Path:
    """Write sweep.html, sweep.json and, where a trial is whole, best/recipe.toml; return the page's path."""
    folder, best = found.sweep.folder, found.best
    if best is not None:
        prepare(found.sweep.recipe, best.values, folder / "best")
    files.write_atomic(folder / "sweep.json", json.dumps(to_json(found), indent=1, allow_nan=False) + "\n")
    files.write_atomic(folder / "sweep.html", page(found))
    return folder / "sweep.html"


def to_json(found: Found) -> dict[str, Any]:
    """Return sweep.json: the page's facts as plain values."""
    study, best = found.sweep.study, found.best
    return {
        "format": FORMAT,
        "name": found.sweep.recipe.name,
        "study": asdict(study),
        "best": None if best is None else asdict(best),
        "train_again": found.train_again(),
        "notes": found.notes(),
        "command": found.command,
        "recipe": asdict(found.sweep.recipe),
        "trials": [asdict(trial) for trial in found.trials],
    }


# ------------------------------------------------------------------------------------------------------ page


def page(found: Found) -> str:
    """Return the page."""
    study, best = found.sweep.study, found.best
    counts = {state: sum(t.state == state for t in found.trials) for state in STATES.values()}
    items = [(state, str(count)) for state, count in counts.items() if count]
    head = tag(
        "header",
        tag("p", "vlafit sweep", class_="kind"),
        tag("h1", found.sweep.recipe.name),
        tag("p", study.purpose, class_="purpose") if study.purpose else "",
        tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for what, value in items), class_="facts"),
    )
    body: list[Content] = [head, notices("Before you believe these numbers", tuple(found.notes()))]
    if best is not None:
        said = f"Trial {best.number}: last validation loss {best.loss:.4g}."
        rows = [(name, written(value)) for name, value in best.values.items()]
        body.append(
            section(
                "Best",
                tag("p", tag("b", said)),
                table([], rows, ("", "number")),
                tag("pre", found.train_again()),
            )
        )
    body += [section("Trials", _table(found)), _charts(found)]
    if found.command:
        body.append(section("Command", tag("pre", found.command)))
    return document(f"{found.sweep.recipe.name}: sweep", join(body))


def _table(found: Found) -> Raw:
    names = list(found.sweep.study.search)
    heads = ("trial", *names, "last loss", "state", "folder")
    order = sorted(found.trials, key=lambda t: (t.state != "whole", math.inf if t.loss is None else t.loss))
    rows = [
        (
            t.number,
            *(written(t.values[name]) if name in t.values else "" for name in names),
            "" if t.loss is None else f"{t.loss:.4g}",
            join([t.state, *([Raw("<br>"), muted(t.error)] if t.error else [])]),
            t.folder,
        )
        for t in order
    ]
    return table(heads, rows, ("number", *("number" for _ in names), "number", "", ""))


def written(value: object) -> str:
    """Return a value as people read it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _charts(found: Found) -> Raw:
    ended = [t for t in found.trials if t.loss is not None]
    if not ended:
        return Raw("")
    drawn = [
        figure("Every trial", "last validation loss; faint: pruned; line: best so far", _history(ended)),
        figure("Validation loss", "against optimiser steps; faint: pruned", _curves(ended)),
    ]
    for name, one in found.sweep.study.search.items():
        points = [(t, v) for t in ended if isinstance(v := t.values.get(name), int | float)]
        if len(points) == len(ended):
            drawn.append(figure(name, "against last validation loss", _scatter(name, points, one.log)))
    return section("Plots", tag("div", *drawn, class_="charts"))


def _history(trials: Sequence[Trial]) -> str:
    figure, axes = plots.frame("trial")
    for trial in trials:
        colour = plots.LINE if trial.state == "whole" else plots.FAINT
        axes.plot([trial.number], [trial.loss or 0.0], "o", color=colour, markersize=4)
    whole = [t for t in trials if t.state == "whole"]
    best = [min(float(t.loss or 0.0) for t in whole[: i + 1]) for i in range(len(whole))]
    axes.step([t.number for t in whole], best, where="post", color=plots.SECOND, linewidth=1.4)
    return _finish(figure, axes, "history", whole_numbers=True)


def _curves(trials: Sequence[Trial]) -> str:
    figure, axes = plots.frame("optimiser step")
    for trial in sorted(trials, key=lambda t: t.state == "whole"):
        colour = plots.LINE if trial.state == "whole" else plots.FAINT
        axes.plot([s for s, _ in trial.curve], [v for _, v in trial.curve], color=colour, linewidth=1.2)
    return _finish(figure, axes, "curves", whole_numbers=True)


def _scatter(name: str, points: Sequence[tuple[Trial, int | float]], log: bool) -> str:
    figure, axes = plots.frame(name)
    for trial, value in points:
        colour = plots.LINE if trial.state == "whole" else plots.FAINT
        axes.plot([value], [trial.loss or 0.0], "o", color=colour, markersize=4)
    if log:
        axes.set_xscale("log")
        return _finish(figure, axes, _identity(name), whole_numbers=None)
    return _finish(figure, axes, _identity(name), whole_numbers=False)


def _finish(figure: Any, axes: Any, name: str, whole_numbers: bool | None) -> str:
    if whole_numbers is not None:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_numbers))
    axes.yaxis.set_major_formatter(FuncFormatter(plots.tick))
    return plots.svg(figure, f"sweep-{name}")


def _identity(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
