"""Keep what a report shows of the training set: counts, statistics of states and actions, and pictures.

They are written into the run's folder when it ends, so that the report needs no dataset.
"""

import base64
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit import files
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import VlafitError
from vlafit.report import plots
from vlafit.report.facts import DATA
from vlafit.report.markup import Content, Raw, escape, figure, folded, join, muted, section, table, tag
from vlafit.rollout.video import write_png
from vlafit.types import Feature

FOLDER, FORMAT = Path(DATA).parent.name, 1
SHOWN_EPISODES, FRAMES, TILE = 3, 8, 120  # films, pictures of each, pixels of their longer side
MOST_READ = 200  # episodes whose states and actions are summarised, evenly spread
SHOWN_TASKS, SHOWN_DIMENSIONS = 10, 12  # rows before the rest is folded

log = logging.getLogger(__name__)


def write(run: Path, datasets: Sequence[tuple[EpisodeStore, Sequence[str], Sequence[str]]]) -> None:
    """Write the summary of each (store, training episodes, held-out episodes) into a run's folder.

    Data that cannot be read are left out with a warning: they end no run that has trained.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    summaries = []
    for number, (store, training, held_out) in enumerate(datasets):
        try:
            summary = _summary(store, training, held_out)
            films = _films(store, training, folder, number)
            summaries.append({**summary, "films": films})
        except (VlafitError, OSError) as error:
            log.warning("the report shows nothing of dataset %s: %s", store.card.name, error)
    content = {"format": FORMAT, "datasets": summaries}
    files.write_atomic(run / DATA, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _summary(store: EpisodeStore, training: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    robot = store.embodiment
    infos = [store.episodes[store.index(identity)] for identity in training]
    tasks = Counter(info.instruction for info in infos)
    positions = [store.index(training[i]) for i in _spread(len(training), MOST_READ)]
    return {
        "card": store.card.name,
        "robot": robot.name,
        "hz": robot.hz,
        "cameras": {camera.name: list(camera.shape[:2]) for camera in robot.cameras},
        "episodes": len(infos),
        "held_out": len(held_out),
        "lengths": [info.length for info in infos],
        "tasks": dict(tasks.most_common()),
        "summarised": len(positions),
        "state": _columns(robot.state, [store.state(i) for i in positions]),
        "action": _columns(robot.action, [store.actions(i) for i in positions]),
    }


def _columns(feature: Feature, values: Sequence[NDArray]) -> list[dict[str, Any]]:
    """Return the statistics of each dimension, in the dataset's own units."""
    if not values:
        return []
    rows = np.concatenate([np.asarray(v, np.float64) for v in values])
    low, median, high = np.quantile(rows, (0.01, 0.5, 0.99), axis=0)
    labels = feature.labels or tuple(str(i) for i in range(rows.shape[1]))
    return [
        {
            "name": label, "unit": feature.unit, "mean": rows[:, i].mean(), "std": rows[:, i].std(),
            "min": rows[:, i].min(), "q01": low[i], "median": median[i], "q99": high[i],
            "max": rows[:, i].max(),
        }
        for i, label in enumerate(labels)
    ]  # fmt: skip


def _films(store: EpisodeStore, training: Sequence[str], folder: Path, number: int) -> list[dict[str, str]]:
    """Write a film strip of the first episode of each of a few tasks; return their files and titles."""
    films, tasks = [], set()
    for identity in training:
        info = store.episodes[store.index(identity)]
        if info.task in tasks or len(films) == SHOWN_EPISODES:
            continue
        tasks.add(info.task)
        episode, steps = store.index(identity), _spread(info.length, FRAMES)
        rows = [
            np.concatenate([_tile(p) for p in store.images(episode, steps, camera.name)], axis=1)
            for camera in store.embodiment.cameras
        ]
        if not rows:
            return []
        width = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
        name = f"{number}_{len(films)}.png"
        write_png(folder / name, np.concatenate(padded))
        films.append({"file": name, "episode": identity, "instruction": info.instruction})
    return films


def _tile(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    longer = max(frame.shape[:2])
    size = (max(1, frame.shape[1] * TILE // longer), max(1, frame.shape[0] * TILE // longer))
    how = Image.Resampling.BOX if longer > TILE else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(frame).resize(size, how))


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` of the numbers below `count`, evenly spread, the first and the last included."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))}) if count else []


# ------------------------------------------------------------------------------------------------------ page


def show(run: Path, datasets: Sequence[Mapping[str, Any]]) -> Raw:
    """Return the section of a run's page; empty for runs of earlier versions."""
    parts: list[Content] = []
    for number, data in enumerate(datasets):
        if len(datasets) > 1:
            parts.append(tag("h3", data["card"]))
        seconds = sum(data["lengths"]) / (data["hz"] or 1.0)
        cameras = ", ".join(f"{name} {h}x{w}" for name, (h, w) in data["cameras"].items())
        parts.append(
            tag(
                "p",
                f"{data['card']}: {data['episodes']} training episodes of {data['robot']}, "
                f"{sum(data['lengths']):,} frames ({seconds / 60:.1f} minutes at {data['hz']:g} Hz), "
                f"{data['held_out']} episodes held out; {cameras}.",
            )
        )
        parts += [_film(run, film) for film in data["films"]]
        parts.append(_tasks(data["tasks"]))
        if len(set(data["lengths"])) > 1:
            chart = figure("Length of the episodes", "steps", _lengths(data["lengths"], number))
            parts.append(tag("div", chart, class_="charts"))
        parts += [_statistics(kind, data) for kind in ("state", "action") if data[kind]]
    return section("Training data", *parts) if parts else Raw("")


def _film(run: Path, film: Mapping[str, str]) -> Raw:
    path = run / FOLDER / Path(film["file"]).name
    if not path.is_file():
        return Raw("")
    data = base64.b64encode(path.read_bytes()).decode()
    title, label = f"{film['episode']}: “{film['instruction']}”", f"pictures of {escape(film['episode'])}"
    picture = Raw(f'<img class="strip" alt="{label}" src="data:image/png;base64,{data}">')
    return join([tag("p", muted(title)), picture])


def _tasks(tasks: Mapping[str, int]) -> Raw:
    rows = list(tasks.items())
    if len(rows) < 2:
        return Raw("")
    shown = table(("instruction", "episodes"), rows[:SHOWN_TASKS], ("", "number"))
    rest = rows[SHOWN_TASKS:]
    if not rest:
        return shown
    more = table(("instruction", "episodes"), rest, ("", "number"))
    return join([shown, folded(f"{len(rest)} more instructions", more)])


def _lengths(lengths: Sequence[int], number: int) -> str:
    figure_, axes = plots.frame("steps of an episode")
    axes.hist(lengths, bins=min(24, len(set(lengths))), color=plots.LINE, rwidth=0.9)
    axes.set_ylabel("episodes", fontsize=9, color=plots.INK)
    return plots.svg(figure_, f"data-lengths-{number}")


def _statistics(kind: str, data: Mapping[str, Any]) -> Raw:
    names = ("mean", "std", "min", "q01", "median", "q99", "max")
    rows = [
        (
            join([c["name"], muted(f" {c['unit']}" if c["unit"] else ""),
                  muted(" does not move") if c["min"] == c["max"] else ""]),
            *(f"{c[name]:.4g}" for name in names),
        )
        for c in data[kind]
    ]  # fmt: skip
    heads = (kind, "mean", "deviation", "lowest", "1 %", "median", "99 %", "highest")
    shown = table(heads, rows, ("name", *("number" for _ in names)))
    if len(rows) <= SHOWN_DIMENSIONS:
        return shown
    return folded(f"Statistics of the {len(rows)} dimensions of the {kind}", shown)
