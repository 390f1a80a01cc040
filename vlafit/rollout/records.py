"""The record of an episode: a line of episodes.jsonl, held against what the evaluation fixes of it."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vlafit import files, score
from vlafit.config import build
from vlafit.errors import ConfigError
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.shard import Shard, Start
from vlafit.score import InvalidAnswers

log = logging.getLogger(__name__)

REMEDY = "put the line back as it was, or remove it, and play the episode again with --resume"


@dataclass(frozen=True)
class Record:
    """How one episode ended: a line of episodes.jsonl."""

    task: str
    trial: int
    seed: int
    instruction: str
    """The sentence that the policy was given."""
    success: bool | None
    """None if and only if the environment failed, see `error`."""
    steps: int
    replans: int
    wall_s: float
    """Seconds from reset to end; other episodes run at the same time."""
    error: str | None = None
    """The traceback, or the last output, of an environment that failed."""
    video: str | None = None
    """The mp4, relative to the folder; the film strip has the same name with the suffix .png."""
    action_change: float | None = None
    """Smoothness: mean change of an action from step to step, over dimensions, in the robot's units; less is
    smoother. None for an episode of fewer than two steps, or of an earlier version."""
    invalid_answers: int | None = None
    """Answers, of `replans`, whose tokens made no chunk of actions; None where the policy answers with
    numbers, and of an earlier version."""


def count_invalid(records: Sequence[Record]) -> InvalidAnswers | None:
    """Count the answers of the records that were no chunk; None where the policy answers with numbers."""
    counted = [record for record in records if record.invalid_answers is not None]
    if not counted:
        return None
    return InvalidAnswers(sum(r.replans for r in counted), sum(r.invalid_answers or 0 for r in counted))


def film_of(task: str, seed: int) -> str:
    """Return the path of an episode's mp4, relative to the evaluation's folder."""
    return f"videos/{re.sub(r'[^A-Za-z0-9._-]', '_', f'{task}_{seed}')}.mp4"


@dataclass(frozen=True)
class EpisodePlan:
    """What an evaluation fixes of the records of its episodes, before any is played."""

    sentences: Mapping[Start, str | None]
    """Of each episode, the sentence that the policy is given; None where only the environment knows it."""
    first_seed: int
    horizon: int
    replan: int

    @classmethod
    def of(cls, identity: Mapping[str, Any], environment: Mapping[str, Any]) -> "EpisodePlan":
        """Return the plan of an evaluation.json, whose two parts these are.

        Raises ConfigError, TypeError, ValueError or KeyError where they are damaged.
        """
        protocol = build(Protocol, identity["protocol"], "protocol")
        instructions = {**environment.get("instructions", {}), **environment.get("partners", {})}
        starts = [
            (str(task), seed) for task in identity["tasks"] for seed in protocol.seeds(identity["trials"])
        ]
        if shard := identity.get("shard"):
            starts = Shard(*map(int, shard)).of(starts)
        sentences: dict[Start, str | None] = {}
        for task, seed in starts:
            own = instructions.get(protocol.swapped.get(task) if identity.get("wrong_instruction") else task)
            known = own is not None or protocol.instruction != "task"
            sentences[task, seed] = protocol.sentence(task, seed, own or "") if known else None
        replan = identity.get("execution", {}).get("replan", protocol.replan)
        return cls(sentences, protocol.first_seed, protocol.horizon, int(replan))

    def fault(self, record: Record) -> str:
        """Return which value of the record cannot be, and what the evaluation says; "" if there is none."""
        if (record.task, record.seed) not in self.sentences:
            return self._unknown(record)
        trial, sentence = record.seed - self.first_seed, self.sentences[record.task, record.seed]
        steps, least = record.steps, 0 if record.error is not None else 1
        asked = math.ceil(steps / self.replan), steps + (record.error is not None)
        film = film_of(record.task, record.seed)
        pairs = [
            (record.trial == trial, "trial", record.trial, f"this seed is of trial {trial}"),
            (
                sentence in (None, record.instruction),
                "instruction",
                repr(record.instruction),
                f"the protocol gives this episode {sentence!r}",
            ),
            (least <= steps <= self.horizon, "steps", steps, f"the protocol's horizon is {self.horizon}"),
            (
                asked[0] <= record.replans <= asked[1],
                "replans",
                record.replans,
                f"{steps} steps, at most {self.replan} of each chunk, take from {asked[0]} to {asked[1]}",
            ),
            (record.video in (None, film), "video", repr(record.video), f"this episode's film is {film!r}"),
        ]
        return next((f"{key} is {value}, but {says}" for fits, key, value, says in pairs if not fits), "")

    def _unknown(self, record: Record) -> str:
        tasks = list(dict.fromkeys(task for task, _ in self.sentences))
        if record.task not in tasks:
            return f"task is {record.task!r}, but the evaluation's tasks are {', '.join(tasks)}"
        seeds = [seed for task, seed in self.sentences if task == record.task]
        listed = f"{seeds[0]} to {seeds[-1]}"
        if len(seeds) <= seeds[-1] - seeds[0]:
            listed += f", every {seeds[1] - seeds[0]}th"
        return f"seed is {record.seed}, but the seeds of this task are {listed}"


def _impossible(record: Record) -> str:
    """Return which counts or times of a record cannot be, whatever was evaluated; "" if there are none."""
    invalid = record.invalid_answers or 0
    if not 0 <= invalid <= record.replans:
        return f"invalid_answers is {invalid} of {record.replans} answers"
    for key in ("wall_s", "action_change"):
        value = getattr(record, key)
        if value is not None and not 0 <= value < math.inf:
            return f"{key} is {value}, but it is a number from 0"
    return ""


def listed_records(path: Path) -> Iterator[Record]:
    """Yield the lines of episodes.jsonl. One with an error is no failure, whatever its `success` says.

    Raises ConfigError for a line that is no record.
    """
    for number, line in enumerate(files.read_json_lines(path), start=1):
        try:
            record = build(Record, line, f"{path}, line {number}")
        except ConfigError as error:
            raise ConfigError(f"{error}; {REMEDY}") from error
        if (record.success is None) != (record.error is not None):
            log.warning(
                "%s, line %d: task %s, seed %d: success is %s and error %s; counted as an environment error",
                path, number, record.task, record.seed, json.dumps(record.success),
                "is not null" if record.error is not None else "is null",
            )  # fmt: skip
            error = record.error if record.error is not None else "its record names no error"
            record = dataclasses.replace(record, success=None, error=error)
        yield record


def read_records(path: Path, plan: EpisodePlan | None) -> list[Record]:
    """Read episodes.jsonl; the last record of an episode counts.

    Raises ConfigError for an episode that ended in two ways, for values that cannot be, and for those that
    differ from the plan (None: unknown). One that ended in an environment error may have been played again.
    """
    records = list(listed_records(path))
    ended: dict[Start, Record] = {}
    for number, record in enumerate(records, start=1):
        place = f"{path}, line {number}: task {record.task}, seed {record.seed}"
        if fault := (plan.fault(record) if plan else "") or _impossible(record):
            raise ConfigError(f"{place}: {fault}; {REMEDY}")
        earlier = ended.get((record.task, record.seed), record)
        if (earlier.success, earlier.steps) != (record.success, record.steps) and earlier.error is None:
            raise ConfigError(
                f"{place}: success {record.success} after {record.steps} steps, but an earlier line says "
                f"{earlier.success} after {earlier.steps}; remove the wrong one, or both to play the episode "
                "again with --resume"
            )
        ended[record.task, record.seed] = record
    return records


def motion(records: Sequence[Record], task: str) -> dict[str, float | None]:
    """Return the median steps to success of a task, and the mean smoothness of its episodes."""
    steps = [record.steps for record in records if record.task == task and record.success]
    changes = [r.action_change for r in records if r.task == task and r.action_change is not None]
    return {
        "median_steps_to_success": float(median(steps)) if steps else None,
        "action_change": round(sum(changes) / len(changes), 6) if changes else None,
    }


def difference(counted: Mapping[str, Mapping[str, Any]], records: Sequence[Record]) -> str:
    """Return where result.json's counts of a task (`counted`) are not those of the records; "" if nowhere.

    Fewer records than were counted are no difference. Raises KeyError, TypeError or ValueError for no counts.
    """
    for task, values in counted.items():
        of_task = [record for record in records if record.task == task]
        total = score.score(record.success for record in of_task)
        there = score.Score(*(int(values[key]) for key in ("successes", "episodes", "errors")))
        pairs = [
            ("successes", there.successes, total.successes),
            ("failures", there.episodes - there.successes, total.episodes - total.successes),
            ("errors", there.errors, total.errors),
        ]
        wrong = [pair for pair in pairs if pair[1] < pair[2]]
        if of_task and len(of_task) == there.episodes + there.errors:
            pairs = [
                (key, values[key], value) for key, value in motion(of_task, task).items() if key in values
            ]
            wrong += [pair for pair in pairs if pair[1] != pair[2]]
        if wrong:
            key, stated, found = wrong[0]
            return f"task {task}: {key} is {stated}, but by the lines of episodes.jsonl it is {found}"
    return ""
