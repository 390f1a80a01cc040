"""Read and write the folder of one evaluation.

evaluation.json  what is evaluated; written first, and compared when an evaluation resumes
episodes.jsonl   one record per episode, fsynced as each ends; sorted by task and seed at the end
videos/          an mp4 and a film strip of each filmed episode;  sheet.png: all the strips
failures.png     the strips of failures, by task, those that ended alike side by side
result.json      the scores; written last
"""

import dataclasses
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from vlafit import files, score
from vlafit.agreement import Item
from vlafit.config import build
from vlafit.envs.messages import Ready
from vlafit.errors import ConfigError, SimulationError, brief
from vlafit.files import parse_json, plain_text
from vlafit.rollout import result_file, video
from vlafit.rollout.failures import like_together
from vlafit.rollout.play import Outcome
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.records import (
    EpisodePlan,
    Record,
    count_invalid,
    film_of,
    motion,
    read_records,
)
from vlafit.score import InvalidAnswers, Score

log = logging.getLogger(__name__)

FORMAT = 1  # of the folder
WRITTEN = ("versions", "software", "renderer", "notices")  # of the environment, in evaluation.json


@dataclass(frozen=True)
class Result:
    """The scores and records of an evaluation. Show `notices` wherever its numbers appear."""

    folder: Path
    protocol: str
    tasks: dict[str, Score]
    overall: Score
    records: tuple[Record, ...]
    notices: tuple[str, ...]
    seconds: float
    hz: float = 0.0
    """Control rate of the robot; 0 for an evaluation of an earlier version."""
    agreement: tuple[Item, ...] = ()
    """What policy and protocol say of the robot, and what was chosen; empty for an earlier version's."""

    @property
    def invalid_answers(self) -> InvalidAnswers | None:
        """Answers that were no chunk of actions; None where the policy answers with numbers."""
        return count_invalid(self.records)

    @property
    def steps_to_success(self) -> float | None:
        """Median number of control steps of the successful episodes; None without any."""
        steps = [record.steps for record in self.records if record.success]
        return float(median(steps)) if steps else None

    @property
    def rate(self) -> float:
        """Success rate over the episodes without error; a Result has at least one such episode."""
        assert self.overall.rate is not None
        return self.overall.rate

    def __str__(self) -> str:
        """The table of scores, followed by time to success and the notices."""
        steps = self.steps_to_success
        seconds = f" ({steps / self.hz:.1f} s)" if steps and self.hz else ""
        lines = [] if steps is None else [f"median time to success: {steps:g} steps{seconds}"]
        lines += [str(self.invalid_answers)] if self.invalid_answers is not None else []
        return "\n".join([score.table(self.tasks), *lines, *self.notices])


class EvaluationFolder:
    """The folder of one evaluation and its contents."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.described: dict[str, Any] = {}

    @property
    def header(self) -> Path:
        """The file that says what is evaluated."""
        return self.path / "evaluation.json"

    @property
    def is_described(self) -> bool:
        return bool(self.described)

    def read(self) -> None:
        """Take identity and environment from the folder. Raises ConfigError if they cannot be read."""
        self.identity, self.described = self._written()

    def adopt(self, environment: Mapping[str, Any]) -> None:
        """Write evaluation.json with the environment of shards that were played elsewhere."""
        files.require_writable(self.path)
        self.described = dict(environment)
        self._write_header()

    def open(self, resume: bool) -> None:
        """Open a new folder, or one of the same evaluation; raise ConfigError for any other."""
        if not self.header.is_file():
            if self.path.is_dir() and not files.is_empty(self.path):
                raise ConfigError(f"{self.path} is not empty and is not an evaluation; choose another folder")
            files.require_writable(self.path)
            return
        if not resume:
            raise ConfigError(
                f"{self.path} already holds an evaluation; resume it with --resume, or choose another folder"
            )
        files.require_writable(self.path)
        identity, self.described = self._written()
        different = [
            f"{key}: {_short(identity.get(key))} there, {_short(value)} here"
            for key in sorted({*self.identity, *identity} - {"protocol"})
            if identity.get(key) != (value := self.identity.get(key))
        ]
        if different:
            listed = "\n  ".join(different)
            raise ConfigError(f"{self.path} holds another evaluation; choose another folder:\n  {listed}")

    def _written(self) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            written = parse_json(plain_text(self.header))
            identity, environment = dict(written["identity"]), dict(written["environment"])
            protocol = dict(identity["protocol"])
            kinds = [(protocol, "name", str), (protocol, "first_seed", int)]
            kinds += [(identity, "tasks", list), (identity, "trials", int)]
            kinds += [(environment, key, object) for key in WRITTEN if environment]
            for values, key, kind in kinds:
                if not isinstance(values[key], kind):
                    raise TypeError(f"{key} is {values[key]!r}")
            _agreement(environment)
            EpisodePlan.of(identity, environment)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.header}: damaged ({brief(error)}); evaluate into another folder, or restore the file"
            ) from error
        stated, hashes = identity.get("protocol_sha256"), build(Protocol, protocol, str(self.header)).hashes()
        if stated not in hashes:
            raise ConfigError(
                f"{self.header}: protocol_sha256 is {stated!r}, but its protocol's is {hashes[0]!r}: one of "
                "the two was changed; evaluate into another folder, or restore the file"
            )
        return identity, environment

    def _write_header(self) -> None:
        header = {"identity": self.identity, "environment": self.described}
        files.write_atomic(self.header, json.dumps(header, indent=2) + "\n")

    def describe(self, ready: Ready, notice: str, agreement: Sequence[Item]) -> None:
        """Write evaluation.json, or check that the environment has not changed since it was written."""
        swapped = self.identity["protocol"]["swapped"] if self.identity["wrong_instruction"] else {}
        partners = {
            swapped[task]: ready.instructions[swapped[task]] for task in self.identity["tasks"] if swapped
        }
        environment = {
            "versions": dict(sorted(ready.versions.items())),
            "software": _versions(),
            "renderer": ready.embodiment.renderer,
            "hz": ready.embodiment.hz,
            "instructions": {task: ready.instructions[task] for task in self.identity["tasks"]},
            **({"partners": partners} if partners else {}),
            "notices": [notice] if notice else [],
            "agreement": [item.to_json() for item in agreement],
        }
        for line in environment["notices"]:
            log.warning("%s", line)
        later = ("hz", "partners")  # earlier versions did not write these
        kept = {**{key: environment[key] for key in later if key in environment}, **self.described}
        decides = environment.keys() - {"agreement"}
        changed = [key for key in sorted(decides) if self.described and environment[key] != kept.get(key)]
        if changed:
            raise ConfigError(
                f"{self.path}: cannot resume: {', '.join(changed)} changed since this evaluation started; "
                "choose another folder"
            )
        self.described = environment
        self._write_header()

    def records(self) -> list[Record]:
        """Return the records of the episodes that have ended; the last one of an episode counts."""
        return read_records(self.path / "episodes.jsonl", EpisodePlan.of(self.identity, self.described))

    def require_counted(self, records: Sequence[Record]) -> None:
        """Raise ConfigError unless result.json, if there is one, counts the records that are there.

        Lines may have been removed to be played again, so more may have been counted.
        """
        if (self.path / "result.json").is_file():
            result_file.require(self.path / "result.json", self._result(), records, self.identity)

    def keep(self, outcome: Outcome, hz: float) -> Record:
        """Write an episode's video, if it was filmed, and then its record."""
        request, film = outcome.request, None
        if request.film and outcome.frames:
            film = film_of(request.task, request.seed)
            video.write_mp4(self.path / film, outcome.frames, hz)
            result = {True: "success", False: "failure", None: "ERROR"}[outcome.success]
            label = (
                f"{request.task}, seed {request.seed}: {result} after {outcome.steps} steps; "
                f"instruction: {request.instruction}"
            )
            strip = video.strip(outcome.frames, video.colour_of(outcome.success), label)
            video.write_png((self.path / film).with_suffix(".png"), strip)
        record = Record(
            request.task,
            request.trial,
            request.seed,
            request.instruction,
            outcome.success,
            outcome.steps,
            outcome.replans,
            outcome.wall_s,
            outcome.error,
            film,
            outcome.action_change,
            outcome.invalid_answers,
        )
        if record.error is not None:
            log.warning("task %s, seed %d: environment error:\n%s", record.task, record.seed, record.error)
        files.append_line(self.path / "episodes.jsonl", json.dumps(dataclasses.asdict(record)))
        return record

    def reopen(self) -> None:
        """Remove the result, because episodes are about to be added."""
        (self.path / "result.json").unlink(missing_ok=True)

    def seconds(self) -> float:
        """Return the time that a finished evaluation took, from result.json; 0 where there is none."""
        return float(self._result()["seconds"]) if (self.path / "result.json").is_file() else 0.0

    def _result(self) -> dict[str, Any]:
        """Return result.json. Raises ConfigError if it has no time or no counts."""
        path = self.path / "result.json"
        try:
            values = parse_json(plain_text(path))
            float(values["seconds"])
            result_file.fault(values, ())
            return values
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: damaged ({brief(error)}); remove this file and evaluate again with "
                "--resume, which keeps every episode"
            ) from error

    def _write_sheets(self, records: Sequence[Record], tasks: Sequence[str]) -> None:
        """Write sheet.png, and failures.png if an episode that failed was filmed."""
        filmed = [(r, (self.path / r.video).with_suffix(".png")) for r in records if r.video]
        filmed = [(record, strip) for record, strip in filmed if strip.is_file()]  # a user may delete some
        if filmed:
            video.write_sheet(self.path / "sheet.png", [strip for _, strip in filmed])
        failed = [
            strip
            for task in tasks
            for strip in like_together([s for r, s in filmed if r.task == task and r.success is False])
        ]
        if failed:
            video.write_sheet(self.path / "failures.png", failed)
        else:
            (self.path / "failures.png").unlink(missing_ok=True)

    def finish(
        self,
        records: list[Record],
        tasks: tuple[str, ...],
        seconds: float,
        more: Mapping[str, Any] | None = None,
        notices: Sequence[str] = (),
    ) -> Result:
        """Sort episodes.jsonl; write the sheets and result.json, which also holds `more` and `notices`."""
        path = self.path / "result.json"
        if path.is_file():  # no episode was left to run
            seconds = self.seconds()
        lines = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        files.write_atomic(self.path / "episodes.jsonl", lines)
        scores = score.by_task(tasks, ((record.task, record.success) for record in records))
        total = score.overall(scores)
        if not total.episodes:
            raise SimulationError(
                f"{self.path}: all {total.errors} episodes ended in an environment error, "
                f"the first:\n{records[0].error}\nFix it, and evaluate again with --retry-errors (or remove "
                f"the folder {self.path})."
            )
        self._write_sheets(records, tasks)
        incomplete = score.errors_notice(total)
        notices = [*([incomplete] if incomplete else []), *notices, *self.described["notices"]]
        if incomplete:
            log.error("%s", incomplete)
        invalid = count_invalid(records)
        content = {
            **self.identity,
            "overall": total.to_json(),
            **({} if invalid is None else {"invalid_answers": invalid.to_json()}),
            "tasks": {
                task: {
                    "instruction": next((r.instruction for r in records if r.task == task), ""),
                    **task_score.to_json(),
                    **motion(records, task),
                }
                for task, task_score in scores.items()
            },
            **(more or {}),
            "agreement": self.described.get("agreement", []),
            "complete": not incomplete,
            "notices": notices,
            **{key: self.described[key] for key in ("versions", "software", "renderer")},
            "seconds": seconds,
        }
        files.write_atomic(path, json.dumps(content, indent=2) + "\n")
        name = self.identity["protocol"]["name"]
        hz = float(self.described.get("hz", 0.0))
        agreed = _agreement(self.described)
        return Result(self.path, name, scores, total, tuple(records), tuple(notices), seconds, hz, agreed)


def _agreement(environment: Mapping[str, Any]) -> tuple[Item, ...]:
    return tuple(map(Item.from_json, environment.get("agreement", ())))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("vlafit", "numpy", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # it runs from a checkout, or is not installed
            pass
    return versions
