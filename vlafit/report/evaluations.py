"""Read a finished evaluation of a run, of which all files have to say the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlafit.config import build
from vlafit.errors import VlafitError, brief
from vlafit.files import parse_json, plain_text
from vlafit.rollout import result_file
from vlafit.rollout.against import Comparison
from vlafit.rollout.evaluation_folder import EvaluationFolder
from vlafit.rollout.records import Record, count_invalid, read_records
from vlafit.score import InvalidAnswers, Score, errors_notice


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
        return count_invalid(self.records)

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
    rows, result = path / "episodes.jsonl", path / "result.json"
    has_header = folder.header.is_file()
    if has_header:
        folder.read()
    try:
        values = parse_json(plain_text(result))
        plan = result_file.plan_of(folder.identity if has_header else values)
        records = tuple(folder.records() if has_header else read_records(rows, plan))
        result_file.require(result, values, records, folder.identity if has_header else None)
        evaluation = _evaluation(name, path, records, values, folder.described.get("notices", ()))
        fault = _comparison(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlafitError(f"its result.json cannot be read ({brief(error)})") from error
    latest = {(record.task, record.seed) for record in records}
    counted = evaluation.overall.episodes + evaluation.overall.errors
    if counted != len(latest):
        fault = f"{counted} episodes, but {rows.name} holds {len(latest)}"
    elif len(latest) != len(plan.sentences) and "against" not in values:
        fault = f"trials is {values['trials']}: {len(plan.sentences)} episodes, but it counts {counted}"
    if fault:
        raise VlafitError(f"{result}: {fault}; one of the two was changed: put it back")
    return evaluation


def _comparison(values: Mapping[str, Any]) -> str:
    """Return whether the comparison's numbers are not those of its sentence, which every page shows."""
    if "against" not in values:
        return ""
    compared, successes = (
        build(Comparison, dict(values["against"]), "against"),
        values["overall"]["successes"],
    )
    if compared.here > successes:
        return f"against: here is {compared.here}, but only {successes} of all episodes succeeded"
    if str(compared) not in values["notices"]:
        return f"against: by its numbers the notice is {str(compared)!r}, which is not among its notices"
    return ""


def _evaluation(
    name: str, path: Path, records: tuple[Record, ...], values: Mapping[str, Any], notices: Iterable[str]
) -> Evaluation:
    overall = result_file.counts_of(values["overall"])
    incomplete = errors_notice(overall)
    return Evaluation(
        name=name,
        folder=path,
        protocol=values["protocol"],
        protocol_sha256=values["protocol_sha256"],
        actor=values["actor"],
        wrong_instruction=values["wrong_instruction"],
        instructions={task: result["instruction"] for task, result in values["tasks"].items()},
        tasks={task: result_file.counts_of(result) for task, result in values["tasks"].items()},
        overall=overall,
        notices=tuple(dict.fromkeys([*([incomplete] if incomplete else []), *values["notices"], *notices])),
        versions=values["versions"],
        software=values["software"],
        renderer=values["renderer"],
        seconds=float(values["seconds"]),
        records=records,
    )
