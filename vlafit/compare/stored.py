"""Read a finished comparison back from compare.json, to write its report again without running anything."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlafit import config, files
from vlafit.compare import arm_record
from vlafit.compare.arm_record import AFTER, WRONG, ArmRecord
from vlafit.compare.arms import Options, candidates
from vlafit.compare.comparison import Comparison
from vlafit.compare.standing import Choice, Standing
from vlafit.errors import VlafitError, brief
from vlafit.files import parse_json, plain_text
from vlafit.recipe import Recipe

FILE = "compare.json"


def read(folder: Path) -> Comparison:
    """Read the comparison in a folder. Raises VlafitError if compare.json is missing or damaged.

    Outcomes by start that a record of an earlier version lacks are read from its episodes, if these still
    exist: arms/NAME/eval/EVALUATION/episodes.jsonl, or in a published folder
    arms/NAME/episodes_EVALUATION.jsonl.
    """
    path = folder / FILE
    try:
        content = parse_json(plain_text(path))
        stored = content["arms"]
        records = {
            record.name: _with_outcomes(folder, record)
            for record in (config.build(ArmRecord, values, f"{path}: arms") for values in stored)
        }
        identity = {key: value for key, value in content["identity"].items() if key != "sha256"}
        command = str(content["command"])
        return Comparison(
            folder=folder,
            recipe=config.build(Recipe, content["recipe"], f"{path}: recipe"),
            options=_options(content, command, records),
            identity=identity,
            standings=tuple(_standing(values, records) for values in content["strategies"]),
            records=tuple(records.values()),
            missing=_missing(content),
            command=command,
        )
    except FileNotFoundError as error:
        raise VlafitError(f"{path}: no such file; name a folder that `vlafit compare` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlafitError(
            f"{path}: damaged ({brief(error)}); run the command of the comparison again to write it anew"
        ) from error


def _with_outcomes(folder: Path, record: ArmRecord) -> ArmRecord:
    """Return the record with outcomes by start, if it lacks them and its episodes are still there."""
    figures = record.figures
    if figures is None or figures.outcomes:
        return record
    outcomes = {}
    for name in (AFTER, WRONG):
        arm = folder / "arms" / record.name
        for path in (arm / "eval" / name / "episodes.jsonl", arm / f"episodes_{name}.jsonl"):
            if name in figures.success and path.is_file():
                outcomes[name] = _outcomes(path, figures.success[name])
                break
    return replace(record, figures=replace(figures, outcomes=outcomes))


def _outcomes(path: Path, scores: Mapping[str, Any]) -> dict[str, dict[str, bool | None]]:
    """Read a file of episodes. Raises VlafitError if it disagrees with the recorded scores."""
    outcomes = arm_record.outcomes_of(
        (str(line["task"]), int(line["seed"]), line["success"]) for line in files.read_json_lines(path)
    )
    for task, score in scores.items():
        successes = sum(success is True for success in outcomes.get(task, {}).values())
        if successes != score.successes:
            raise VlafitError(
                f"{path}: {successes} successes of task {task!r}, but the arm's record has "
                f"{score.successes}; the files are of different evaluations"
            )
    return outcomes


def _options(content: Mapping[str, Any], command: str, records: Mapping[str, ArmRecord]) -> Options:
    grid = tuple(float(lr) for lr in content["lr_grid"])
    chosen = {values["strategy"]: values["lr"] for values in content["strategies"]}
    searched = {r.seed for r in records.values() if grid and r.lr != chosen.get(r.strategy)}
    in_command = re.search(r"--jobs[ =](\d+)", command)  # earlier versions kept it only there
    jobs = content.get("jobs") or (int(in_command.group(1)) if in_command else 1)
    return Options(
        strategies=tuple(chosen),
        seeds=tuple(int(seed) for seed in content["seeds"]),
        lr_grid=grid,
        grid_seeds=max(1, len(searched)),
        jobs=int(jobs),
    )


def _standing(values: Mapping[str, Any], records: Mapping[str, ArmRecord]) -> Standing:
    tried = {float(t["lr"]): t["last_loss"] for t in values["lr_tried"]}
    own = [r for r in records.values() if r.strategy == values["strategy"]]
    choice = Choice(float(values["lr"]), tried, values["lr_at_edge"]) if tried and values["lr"] else None
    at_lr = tuple(r for r in own if r.lr == values["lr"])
    return Standing(values["strategy"], values["lr"], at_lr, choice, _adapts(own))


def _adapts(records: list[ArmRecord]) -> bool:
    """Return whether the strategy has adapters; False if its file cannot be read any more."""
    try:
        return bool(records) and candidates([records[0].strategy_given])[0].adapts
    except VlafitError:
        return False


def _missing(content: Mapping[str, Any]) -> tuple[str, ...]:
    ending = re.compile(r"^(\S+) has not ended")
    return tuple(match.group(1) for line in content["missing"] if (match := ending.match(line)))
