"""What a run folder says about itself, read once: the page, the JSON and the pictures tell only this.

A run may be unfinished or lack evaluations: what is absent is a sentence in `missing`, never a guess. What a
reader must know before believing a number (errors of environments, a foreign renderer, metrics that were not
finite) is a sentence in `caveats`.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlafit import config, files
from vlafit.errors import VlafitError
from vlafit.recipe import Recipe
from vlafit.rollout.run import Record
from vlafit.score import Score, errors_notice
from vlafit.tuning import Plan

FORMAT = 1  # of report.json
BEFORE, AFTER, WRONG = "before", "after", "wrong_instruction"


@dataclass(frozen=True)
class Point:
    """One logged value. `time_s` is training time, without evaluations; None where none was logged."""

    step: int
    time_s: float | None
    value: float


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation of the run: a folder below eval/."""

    name: str
    folder: Path
    protocol: Mapping[str, Any]
    protocol_sha256: str
    actor: str
    wrong_instruction: bool
    instructions: Mapping[str, str]  # task -> the sentence that the policy was told
    tasks: Mapping[str, Score]
    overall: Score
    notices: tuple[str, ...]
    versions: Mapping[str, str]
    software: Mapping[str, str]
    renderer: str
    seconds: float
    records: tuple[Record, ...]

    @property
    def step(self) -> int | None:
        """Optimiser steps before it, where its name tells: step_000500."""
        digits = self.name.removeprefix("step_")
        return int(digits) if self.name.startswith("step_") and digits.isdigit() else None

    @property
    def filmed(self) -> list[Record]:
        """Episodes of which the folder holds a film strip."""
        return [r for r in self.records if r.video and self.strip(r).is_file()]

    def strip(self, record: Record) -> Path:
        """Return the path of a filmed episode's film strip."""
        return (self.folder / (record.video or "")).with_suffix(".png")


@dataclass(frozen=True)
class Facts:
    """Everything that a report tells."""

    folder: Path
    recipe: Recipe
    recipe_toml: str
    run: Mapping[str, Any]  # run.json; empty where the run did not come so far
    plan: Plan | None
    metrics: Mapping[str, tuple[Point, ...]]
    evaluations: Mapping[str, Evaluation]
    hashes: Mapping[str, str]  # file -> sha256
    missing: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((p.step for points in self.metrics.values() for p in points), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.run.get("finished") is True

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training, as far as they were logged; evaluations are not among them."""
        times = [p.time_s for points in self.metrics.values() for p in points if p.time_s is not None]
        return max(times, default=None)

    def success(self) -> dict[str, Score]:
        """Return the overall score of each evaluation, by its name."""
        return {name: one.overall for name, one in self.evaluations.items()}

    def commands(self) -> list[tuple[str, str]]:
        """Return (what for, command line) pairs that make this run, its evaluations and its report again."""
        begun = str(self.run.get("command") or "")
        lines = [("this run", begun)] if begun else []
        launcher = begun.partition("vlafit train")[0]  # of a run on several processes

        def say(what: str, *words: str | Path, before: str = "") -> None:
            lines.append((what, before + shlex.join(["vlafit", *map(str, words)])))

        recipe = self.folder / "recipe.toml"
        say("the same run again", "train", recipe, "--out", "runs/again", before=launcher)
        if not self.finished:
            say("go on with it", "train", recipe, "--out", self.folder, "--resume", before=launcher)
        last = self.folder / "checkpoints" / f"step_{self.steps:06d}"
        if self.recipe.eval.protocol and last.is_dir():
            say("its evaluation again", "eval", last, "--protocol", self.recipe.eval.protocol)
        say("this page again", "report", self.folder)
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return report.json: the same facts as the page, as plain values."""
        return {
            "format": FORMAT,
            "name": self.recipe.name,
            "purpose": self.recipe.purpose,
            "finished": self.finished,
            "success": {name: one.to_json() for name, one in self.success().items()},
            "verdict": verdict(self.success()),
            "evaluations": {name: _evaluation_json(one) for name, one in self.evaluations.items()},
            "training": {
                "steps": self.steps,
                "steps_wanted": self.recipe.train.steps,
                "seconds": self.train_seconds,
                "metrics": {name: _extremes(points) for name, points in self.metrics.items()},
            },
            "tuning": {"strategy": self.recipe.strategy, "rows": self.plan.rows() if self.plan else []},
            "recipe": asdict(self.recipe),
            "run": dict(self.run),
            "commands": [{"for": what, "command": line} for what, line in self.commands()],
            "sha256": dict(self.hashes),
            "caveats": list(self.caveats),
            "missing": list(self.missing),
        }


def verdict(success: Mapping[str, Score]) -> str:
    """Say in one sentence what before and after show together; empty when one of them is missing."""
    if BEFORE not in success or AFTER not in success:
        return ""
    (low_before, high_before), (low_after, high_after) = success[BEFORE].interval, success[AFTER].interval
    if low_after > high_before:
        return "Success rose, and the two 95 % intervals do not overlap."
    if high_after < low_before:
        return "Success fell, and the two 95 % intervals do not overlap."
    return "The two 95 % intervals overlap: these episodes alone do not show a difference."


def read_facts(folder: Path) -> Facts:
    """Read a run folder. Raises VlafitError when it is none, or when its recipe or metrics cannot be read."""
    folder = Path(folder)
    kept = folder / "recipe.toml"
    if not kept.is_file():
        what = "holds no recipe.toml, so it is no run" if folder.is_dir() else "does not exist"
        raise VlafitError(f"{folder} {what}; name a folder that `vlafit train` made, such as runs/quickstart")
    recipe = config.read(Recipe, kept, "recipe")
    missing: list[str] = []
    run = _run(folder, missing)
    plan = _plan(folder, missing)
    metrics, caveats = _metrics(folder, missing)
    evaluations = _evaluations(folder, recipe, missing)
    for name, one in evaluations.items():
        notices = one.notices or tuple(n for n in [errors_notice(one.overall)] if n)
        caveats += [f"Evaluation {name!r}: {notice}" for notice in notices]
    caveats = [*(str(notice) for notice in run.get("notices", ())), *caveats]
    facts = Facts(
        folder=folder,
        recipe=recipe,
        recipe_toml=kept.read_text(encoding="utf-8"),
        run=run,
        plan=plan,
        metrics=metrics,
        evaluations=evaluations,
        hashes=_hashes(folder, run),
        missing=tuple(missing),
        caveats=tuple(caveats),
    )
    return facts


def _run(folder: Path, missing: list[str]) -> Mapping[str, Any]:
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        missing.append("run.json: the run stopped before it began to train; versions and times are unknown.")
        return {}
    except ValueError as error:
        missing.append(f"run.json cannot be read ({error}); versions and times are unknown.")
        return {}
    if run.get("finished") is not True:
        missing.append("The run has not finished: what is shown is what it had come to.")
    return run


def _plan(folder: Path, missing: list[str]) -> Plan | None:
    path = folder / "plan.json"
    if not path.is_file():
        missing.append("plan.json: the tuning strategy was not applied yet.")
        return None
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (VlafitError, UnicodeDecodeError) as error:
        missing.append(f"plan.json cannot be read ({error}).")
        return None


def _metrics(folder: Path, missing: list[str]) -> tuple[dict[str, tuple[Point, ...]], list[str]]:
    found: dict[str, list[Point]] = {}
    odd: dict[str, int] = {}
    for event in files.read_json_lines(folder / "metrics.jsonl"):
        step, time_s = event.get("step"), event.get("time_s")
        if not isinstance(step, int):
            raise VlafitError(f"{folder / 'metrics.jsonl'}: an event has no step: {event}; remove its line")
        for name, value in event.items():
            if name in ("step", "time_s"):
                continue
            points = found.setdefault(name, [])
            if isinstance(value, int | float) and math.isfinite(value):
                points.append(Point(step, time_s if isinstance(time_s, int | float) else None, float(value)))
            else:
                odd[name] = odd.get(name, 0) + 1
    if not found:
        missing.append("metrics.jsonl: nothing was logged yet.")
    caveats = [
        f"{count} logged values of {name} were not finite and are not drawn." for name, count in odd.items()
    ]
    return {name: tuple(points) for name, points in found.items()}, caveats


def _evaluations(folder: Path, recipe: Recipe, missing: list[str]) -> dict[str, Evaluation]:
    asked = {BEFORE: recipe.eval.before, AFTER: recipe.eval.after, WRONG: recipe.eval.wrong_instruction}
    there = sorted(p.name for p in (folder / "eval").glob("*") if p.is_dir() and not p.name.startswith("."))
    names = [*(n for n in asked if n in there), *(n for n in there if n not in asked)]
    found = {}
    for name in names:
        path = folder / "eval" / name
        records = tuple(
            config.build(Record, line, str(path / "episodes.jsonl"))
            for line in files.read_json_lines(path / "episodes.jsonl")
        )
        if not (path / "result.json").is_file():
            missing.append(f"Evaluation {name!r} stopped after {len(records)} episodes; it is left out.")
            continue
        try:
            found[name] = _evaluation(name, path, records)
        except (ValueError, KeyError, TypeError) as error:
            missing.append(f"Evaluation {name!r} is left out: its result.json cannot be read ({error!r}).")
    if not recipe.eval.protocol:
        if not found:
            missing.append("The recipe names no protocol, so nothing was rolled out.")
    else:
        for name, wanted in asked.items():
            if wanted and name not in there:
                missing.append(f"Evaluation {name!r} was asked for and has not begun.")
    return found


def _evaluation(name: str, path: Path, records: tuple[Record, ...]) -> Evaluation:
    values = json.loads((path / "result.json").read_text(encoding="utf-8"))
    return Evaluation(
        name=name,
        folder=path,
        protocol=values["protocol"],
        protocol_sha256=values["protocol_sha256"],
        actor=values["actor"],
        wrong_instruction=values["wrong_instruction"],
        instructions={task: one["instruction"] for task, one in values["tasks"].items()},
        tasks={task: _score(one) for task, one in values["tasks"].items()},
        overall=_score(values["overall"]),
        notices=tuple(values["notices"]),
        versions=values["versions"],
        software=values["software"],
        renderer=values["renderer"],
        seconds=float(values["seconds"]),
        records=records,
    )


def _score(values: Mapping[str, Any]) -> Score:
    score = Score(int(values["successes"]), int(values["episodes"]), int(values["errors"]))
    if not 0 <= score.successes <= score.episodes:
        raise ValueError(f"{score.successes} successes of {score.episodes} episodes")
    return score


def _evaluation_json(one: Evaluation) -> dict[str, Any]:
    return {
        "folder": str(one.folder.relative_to(one.folder.parents[1])),
        "protocol": one.protocol.get("name"),
        "protocol_sha256": one.protocol_sha256,
        "actor": one.actor,
        "renderer": one.renderer,
        "versions": {**one.versions, **one.software},
        "seconds": one.seconds,
        "notices": list(one.notices),
        "tasks": {
            task: {"instruction": one.instructions[task], **score.to_json()}
            for task, score in one.tasks.items()
        },
        "episodes": [
            {"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps, "error": r.error}
            for r in one.records
        ],
    }


def _extremes(points: tuple[Point, ...]) -> dict[str, float | int]:
    """Return the first, last and lowest value, and where the lowest lies."""
    if not points:
        return {}
    best = min(points, key=lambda p: p.value)
    return {
        "first": points[0].value,
        "last": points[-1].value,
        "lowest": best.value,
        "lowest_step": best.step,
    }


def _hashes(folder: Path, run: Mapping[str, Any]) -> dict[str, str]:
    """Hash the small files that pin the rest: a checkpoint's manifest holds the hashes of its files.

    What the run began with, base checkpoint and datasets, was hashed when it began.
    """
    began = {"base checkpoint": str(run.get("base_sha256") or "")}
    began |= {f"dataset {one['card']}": str(one["sha256"]) for one in run.get("datasets", ())}
    paths = [folder / "recipe.toml", *sorted((folder / "checkpoints").glob("step_*/manifest.json"))]
    hashed = {str(path.relative_to(folder)): files.sha256(path) for path in paths if path.is_file()}
    return {**{what: value for what, value in began.items() if value}, **hashed}
