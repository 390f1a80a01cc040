"""Read a finished evaluation of a run, of which all files have to say the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlafit.errors import VlafitError, brief
from vlafit.files import parse_json, plain_text
from vlafit.rollout.evaluation_folder import EvaluationFolder
from vlafit.rollout.records import InvalidAnswers, Record, difference, read_records
from vlafit.score import Score

SAME = ("protocol_sha256", "actor", "trials", "wrong_instruction")  # in evaluation.json and result.json


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation of the run: a folder in eval/."""

    name: str
    folder: Path
    protocol: Mapping[str, Any]
    protocol_sha256: str
    actor: str
    wrong_instruction: bool
    instructions: Mapping[str, str]  # task -> the instruction that the policy was given
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
        """Optimiser steps before it, if its name has them: step_000500."""
        digits = self.name.removeprefix("step_")
        return int(digits) if self.name.startswith("step_") and digits.isdecimal() else None

    @property
    def invalid_answers(self) -> InvalidAnswers | None:
        """Answers that were no chunk of actions; None where the policy answers with numbers."""
        return InvalidAnswers.of(self.records)

    @property
    def filmed(self) -> list[Record]:
        """Records of the episodes with a film strip in the folder."""
        return [r for r in self.records if r.video and self.strip(r).is_file()]

    def strip(self, record: Record) -> Path:
        """Return the path of a filmed episode's film strip."""
        return (self.folder / (record.video or "")).with_suffix(".png")


def read_evaluation(name: str, path: Path) -> Evaluation:
    """Read a finished evaluation. Raises VlafitError if a file is damaged, or its files differ."""
    folder = EvaluationFolder(path, {})
    rows = path / "episodes.jsonl"
    if folder.header.is_file():
        folder.read()
        records = tuple(folder.records())
    else:  # a copy without it
        records = tuple(read_records(rows, None))
    try:
        values = parse_json(plain_text(path / "result.json"))
        for key in SAME if folder.header.is_file() else ():
            if values[key] != folder.identity[key]:
                raise VlafitError(
                    f"{path / 'result.json'}: {key} is {values[key]}, but {folder.header} says "
                    f"{folder.identity[key]}; the two are of different evaluations, or one was changed"
                )
        evaluation = _evaluation(name, path, records, values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlafitError(f"its result.json cannot be read ({brief(error)})") from error
    latest = {(record.task, record.seed) for record in records}
    counted = evaluation.overall.episodes + evaluation.overall.errors
    if fault := difference(values["tasks"], records) or (
        f"{counted} episodes, but {rows.name} holds {len(latest)}" if counted != len(latest) else ""
    ):
        raise VlafitError(f"{path / 'result.json'}: {fault}; one of the two was changed: put it back")
    return evaluation


def _evaluation(name: str, path: Path, records: tuple[Record, ...], values: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        name=name,
        folder=path,
        protocol=values["protocol"],
        protocol_sha256=values["protocol_sha256"],
        actor=values["actor"],
        wrong_instruction=values["wrong_instruction"],
        instructions={task: result["instruction"] for task, result in values["tasks"].items()},
        tasks={task: _score(result) for task, result in values["tasks"].items()},
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
