"""Read a run folder into `Facts`, from which the page, the JSON and the pictures are made.

A run may be unfinished or lack evaluations: each missing item is a sentence in `missing`. Warnings about the
numbers (environment errors, another renderer, metrics that were not finite) are in `caveats`.
"""

import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlafit import config, files
from vlafit.errors import VlafitError
from vlafit.files import parse_json, plain_text
from vlafit.offline import read_checked
from vlafit.recipe import Recipe
from vlafit.report.evaluations import Evaluation, read_evaluation
from vlafit.report.logged import Point, read_metrics
from vlafit.rollout.records import listed_records
from vlafit.score import Score, errors_notice
from vlafit.tuning import Plan

log = logging.getLogger(__name__)

FORMAT = 1  # of report.json
STAGE = "train/stage"  # metric logged when a stage starts, counted from 1
DATA = "data/summary.json"  # written by `training_data`
OFFLINE = "held_out"  # folder of the evaluations without a simulator
BEFORE, AFTER, WRONG = "before", "after", "wrong_instruction"


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows."""

    folder: Path
    recipe: Recipe
    recipe_toml: str
    run: Mapping[str, Any]  # run.json; empty if the run stopped before writing it
    plan: Plan | None
    metrics: Mapping[str, tuple[Point, ...]]
    evaluations: Mapping[str, Evaluation]
    offline: Mapping[str, Mapping[str, Any]]  # folder in held_out/ -> its result.json
    data: tuple[Mapping[str, Any], ...]  # summaries of the training sets; see `training_data`
    hashes: Mapping[str, str]  # file -> sha256
    missing: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The last logged step."""
        return max((p.step for points in self.metrics.values() for p in points), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return self.run.get("finished") is True

    @property
    def train_seconds(self) -> float | None:
        """Logged training time in seconds, without evaluations."""
        times = [p.time_s for points in self.metrics.values() for p in points if p.time_s is not None]
        return max(times, default=None)

    @cached_property
    def stages(self) -> list[tuple[Plan, Point | None]]:
        """The plan of each stage and the point at which it started (None: not yet)."""
        if self.plan is None:
            return []
        starts = {round(p.value) - 1: p for p in self.metrics.get(STAGE, ())}
        plans = [self.plan.at(number) for number in range(len(self.plan.strategy.stages))]
        return [(plan, starts.get(plan.stage)) for plan in plans]

    def success(self) -> dict[str, Score]:
        """Return the overall score of each evaluation by name."""
        return {name: evaluation.overall for name, evaluation in self.evaluations.items()}

    def commands(self) -> list[tuple[str, str]]:
        """Return (purpose, command line) pairs that repeat this run, its evaluation and its report."""
        original = str(self.run.get("command") or "")
        lines = [("this run", original)] if original else []
        launcher = original.partition("vlafit train")[0]  # of a run on several processes

        def add(purpose: str, *words: str | Path, before: str = "") -> None:
            lines.append((purpose, before + shlex.join(["vlafit", *map(str, words)])))

        recipe = self.folder / "recipe.toml"
        add("the same run again", "train", recipe, "--out", "runs/again", before=launcher)
        if not self.finished:
            add("resume this run", "train", recipe, "--out", self.folder, "--resume", before=launcher)
        last = self.folder / "checkpoints" / f"step_{self.steps:06d}"
        if self.recipe.eval.protocol and last.is_dir():
            add("its evaluation again", "eval", last, "--protocol", self.recipe.eval.protocol)
        add("this page again", "report", self.folder)
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return report.json: the facts of the page as plain values."""
        return {
            "format": FORMAT,
            "name": self.recipe.name,
            "purpose": self.recipe.purpose,
            "finished": self.finished,
            "success": {name: score.to_json() for name, score in self.success().items()},
            "verdict": verdict(self.success()),
            "evaluations": {name: _evaluation_json(e) for name, e in self.evaluations.items()},
            "held_out": {
                name: {key: value for key, value in result.items() if key != "samples"}
                for name, result in self.offline.items()
            },
            "data": list(self.data),
            "training": {
                "steps": self.steps,
                "steps_wanted": self.recipe.train.steps,
                "seconds": self.train_seconds,
                "metrics": {name: _extremes(points) for name, points in self.metrics.items()},
            },
            "tuning": {
                "strategy": self.recipe.strategy,
                "rows": self.plan.rows() if self.plan else [],
                "stages": [
                    {
                        "name": plan.strategy.stages[plan.stage].name,
                        "began": 0 if not plan.stage else start and start.step,
                        "rows": plan.rows(),
                    }
                    for plan, start in self.stages
                ],
            },
            "recipe": asdict(self.recipe),
            "run": dict(self.run),
            "commands": [{"for": purpose, "command": line} for purpose, line in self.commands()],
            "sha256": dict(self.hashes),
            "caveats": list(self.caveats),
            "missing": list(self.missing),
        }


def verdict(success: Mapping[str, Score]) -> str:
    """Compare the success before and after training in one sentence; "" if one of them is missing."""
    if BEFORE not in success or AFTER not in success:
        return ""
    (low_before, high_before), (low_after, high_after) = success[BEFORE].interval, success[AFTER].interval
    if low_after > high_before:
        return "Success rose, and the two 95 % intervals do not overlap."
    if high_after < low_before:
        return "Success fell, and the two 95 % intervals do not overlap."
    return "The two 95 % intervals overlap: these episodes do not show a difference."


def read_facts(folder: Path) -> Facts:
    """Read a run folder. Raises VlafitError if it is not one, or its recipe or metrics cannot be read."""
    folder = Path(folder)
    recipe_file = folder / "recipe.toml"
    if not recipe_file.is_file():
        fault = "holds no recipe.toml, so it is not a run" if folder.is_dir() else "does not exist"
        raise VlafitError(
            f"{folder} {fault}; name a folder that `vlafit train` wrote, such as runs/quickstart"
        )
    recipe = config.read(Recipe, recipe_file, "recipe")
    missing: list[str] = []
    run = _run(folder, missing)
    plan = _plan(folder, missing)
    metrics, caveats = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        missing.append(
            f"metrics.jsonl holds nothing, though run.json says {run['steps']} steps: the history is lost."
            if run.get("steps")
            else "metrics.jsonl: nothing has been logged yet."
        )
    offline = _offline(folder, missing)
    evaluations = _evaluations(folder, recipe, missing, bool(offline))
    for name, evaluation in evaluations.items():
        notices = evaluation.notices or tuple(n for n in [errors_notice(evaluation.overall)] if n)
        caveats += [f"Evaluation {name!r}: {notice}" for notice in notices]
    caveats = [*(str(notice) for notice in run.get("notices", ())), *caveats]
    facts = Facts(
        folder=folder,
        recipe=recipe,
        recipe_toml=plain_text(recipe_file),
        run=run,
        plan=plan,
        metrics=metrics,
        evaluations=evaluations,
        offline=offline,
        data=_data(folder, missing),
        hashes=_hashes(folder, run),
        missing=tuple(missing),
        caveats=tuple(caveats),
    )
    return facts


def _run(folder: Path, missing: list[str]) -> Mapping[str, Any]:
    path = folder / "run.json"
    try:
        run = parse_json(plain_text(path))
        if not isinstance(run, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        missing.append("run.json: the run stopped before training started; versions and times are unknown.")
        return {}
    except ValueError as error:
        missing.append(f"run.json cannot be read ({error}); versions and times are unknown.")
        return {}
    if run.get("finished") is not True:
        missing.append("The run has not finished: this page shows its state so far.")
    return run


def _plan(folder: Path, missing: list[str]) -> Plan | None:
    path = folder / "plan.json"
    if not path.is_file():
        missing.append("plan.json: the tuning strategy has not been applied yet.")
        return None
    try:
        return Plan.from_json(plain_text(path))
    except (VlafitError, UnicodeDecodeError) as error:
        missing.append(f"plan.json cannot be read ({error}).")
        return None


def _data(folder: Path, missing: list[str]) -> tuple[Mapping[str, Any], ...]:
    path = folder / DATA
    try:
        datasets = parse_json(path.read_text(encoding="utf-8"))["datasets"] if path.is_file() else []
        return tuple(dict(dataset) for dataset in datasets)
    except (ValueError, KeyError, TypeError) as error:
        missing.append(f"{DATA} cannot be read ({error!r}): the training data are not shown.")
        return ()


def _offline(folder: Path, missing: list[str]) -> dict[str, Mapping[str, Any]]:
    results = {}
    for path in sorted((folder / OFFLINE).glob("*")):
        try:
            results[path.name] = read_checked(path)
        except VlafitError as error:
            missing.append(f"Held-out episodes {path.name!r} are left out: {error}")
            log.warning("%s", missing[-1])
    return results


def _evaluations(folder: Path, recipe: Recipe, missing: list[str], offline: bool) -> dict[str, Evaluation]:
    requested = {BEFORE: recipe.eval.before, AFTER: recipe.eval.after, WRONG: recipe.eval.controls}
    present = sorted(p.name for p in (folder / "eval").glob("*") if p.is_dir() and not p.name.startswith("."))
    names = [*(n for n in requested if n in present), *(n for n in present if n not in requested)]
    evaluations = {}
    for name in names:
        path = folder / "eval" / name
        try:
            records = tuple(listed_records(path / "episodes.jsonl"))
            if not (path / "result.json").is_file():
                missing.append(f"Evaluation {name!r} stopped after {len(records)} episodes; it is left out.")
                continue
            evaluations[name] = read_evaluation(name, path)
        except VlafitError as error:
            missing.append(f"Evaluation {name!r} is left out: {error}.")
            log.warning("%s", missing[-1])
    if not recipe.eval.protocol:
        if not evaluations and not offline:
            missing.append("The recipe names no protocol, so the policy was not evaluated.")
    else:
        for name, wanted in requested.items():
            if wanted and name not in present:
                missing.append(f"Evaluation {name!r} was requested and has not started.")
    return evaluations


def _evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "folder": str(evaluation.folder.relative_to(evaluation.folder.parents[1])),
        "protocol": evaluation.protocol.get("name"),
        "protocol_sha256": evaluation.protocol_sha256,
        "actor": evaluation.actor,
        "renderer": evaluation.renderer,
        "versions": {**evaluation.versions, **evaluation.software},
        "seconds": evaluation.seconds,
        **({"invalid_answers": invalid.to_json()} if (invalid := evaluation.invalid_answers) else {}),
        "notices": list(evaluation.notices),
        "tasks": {
            task: {"instruction": evaluation.instructions[task], **score.to_json()}
            for task, score in evaluation.tasks.items()
        },
        "episodes": [
            {"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps, "error": r.error}
            | ({} if r.invalid_answers is None else {"invalid_answers": r.invalid_answers})
            for r in evaluation.records
        ],
    }


def _extremes(points: tuple[Point, ...]) -> dict[str, float | int]:
    """Return the first, last and lowest value, and the step of the lowest."""
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
    """Hash the files that pin all others: a checkpoint's manifest holds the hashes of its files.

    The hashes of base checkpoint and datasets were recorded when the run started.
    """
    inputs = {"base checkpoint": str(run.get("base_sha256") or "")}
    inputs |= {f"dataset {dataset['card']}": str(dataset["sha256"]) for dataset in run.get("datasets", ())}
    paths = [folder / "recipe.toml", *sorted((folder / "checkpoints").glob("step_*/manifest.json"))]
    hashed = {str(path.relative_to(folder)): files.sha256(path) for path in paths if path.is_file()}
    return {**{name: value for name, value in inputs.items() if value}, **hashed}
