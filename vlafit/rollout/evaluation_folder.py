"""Read and write the folder of one evaluation.

evaluation.json  what is evaluated; written first, and compared when an evaluation resumes
episodes.jsonl   one record per episode, fsynced as each ends; sorted by task and seed at the end
videos/          an mp4 and a film strip of each filmed episode;  sheet.png: all the strips
result.json      the scores; written last
"""

import dataclasses
import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlafit import files, score
from vlafit.config import build
from vlafit.errors import ConfigError, SimulationError
from vlafit.files import parse_json
from vlafit.rollout import video
from vlafit.rollout.play import Outcome
from vlafit.rollout.worker import Ready
from vlafit.score import Score

log = logging.getLogger(__name__)

FORMAT = 1  # of the folder


@dataclass(frozen=True)
class Record:
    """How one episode ended: a line of episodes.jsonl."""

    task: str
    trial: int
    seed: int
    instruction: str
    """The sentence that the policy was given."""
    success: bool | None
    """None: the environment failed, see `error`."""
    steps: int
    replans: int
    wall_s: float
    """Seconds from reset to end; other episodes run at the same time."""
    error: str | None = None
    """The traceback, or the last output, of an environment that failed."""
    video: str | None = None
    """The mp4, relative to the folder; the film strip has the same name with the suffix .png."""


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

    @property
    def rate(self) -> float:
        """Success rate over the episodes without error; a Result has at least one such episode."""
        assert self.overall.rate is not None
        return self.overall.rate

    def __str__(self) -> str:
        """The table of scores, followed by the notices."""
        return "\n".join([score.table(self.tasks), *self.notices])


class EvaluationFolder:
    """The folder of one evaluation and its contents."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.described: dict[str, Any] = {}

    @property
    def is_described(self) -> bool:
        return bool(self.described)

    def open(self, resume: bool) -> None:
        """Open a new folder, or one of the same evaluation; raise ConfigError for any other."""
        header = self.path / "evaluation.json"
        if not header.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and is not an evaluation; choose another folder")
            files.require_writable(self.path)
            return
        if not resume:
            raise ConfigError(
                f"{self.path} already holds an evaluation; resume it with --resume, or choose another folder"
            )
        files.require_writable(self.path)
        try:
            written = parse_json(header.read_text(encoding="utf-8"))
            identity, self.described = dict(written["identity"]), dict(written["environment"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{header}: damaged ({error!r}); choose another folder") from error
        different = [
            f"{key}: {_short(identity.get(key))} there, {_short(value)} here"
            for key in sorted({*self.identity, *identity} - {"protocol"})
            if identity.get(key) != (value := self.identity.get(key))
        ]
        if different:
            listed = "\n  ".join(different)
            raise ConfigError(f"{self.path} holds another evaluation; choose another folder:\n  {listed}")

    def describe(self, ready: Ready, notice: str) -> None:
        """Write evaluation.json, or check that the environment has not changed since it was written."""
        environment = {
            "versions": dict(sorted(ready.versions.items())),
            "software": _versions(),
            "renderer": ready.embodiment.renderer,
            "instructions": {task: ready.instructions[task] for task in self.identity["tasks"]},
            "notices": [notice] if notice else [],
        }
        for line in environment["notices"]:
            log.warning("%s", line)
        if self.described and self.described != environment:
            changed = [key for key in environment if environment[key] != self.described.get(key)]
            raise ConfigError(
                f"{self.path}: cannot resume: {', '.join(changed)} changed since this evaluation started; "
                "choose another folder"
            )
        self.described = environment
        header = {"identity": self.identity, "environment": environment}
        files.write_atomic(self.path / "evaluation.json", json.dumps(header, indent=2) + "\n")

    def records(self) -> list[Record]:
        """Return the records of the episodes that have ended."""
        path = self.path / "episodes.jsonl"
        return [build(Record, line, str(path)) for line in files.read_json_lines(path)]

    def keep(self, outcome: Outcome, hz: float) -> Record:
        """Write an episode's video, if it was filmed, and then its record."""
        request, film = outcome.request, None
        if request.film and outcome.frames:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{request.task}_{request.seed}")
            film = f"videos/{name}.mp4"
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
        )
        if record.error is not None:
            log.warning("task %s, seed %d: environment error:\n%s", record.task, record.seed, record.error)
        files.append_line(self.path / "episodes.jsonl", json.dumps(dataclasses.asdict(record)))
        return record

    def finish(self, records: list[Record], tasks: tuple[str, ...], seconds: float) -> Result:
        """Sort episodes.jsonl; write sheet.png and result.json."""
        result_file = self.path / "result.json"
        if result_file.is_file():  # no episode was left to run
            try:
                seconds = float(parse_json(result_file.read_text(encoding="utf-8"))["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{result_file}: damaged ({error!r}); remove this file and evaluate again with --resume, "
                    "which keeps every episode"
                ) from error
        lines = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        files.write_atomic(self.path / "episodes.jsonl", lines)
        scores = score.by_task(tasks, ((record.task, record.success) for record in records))
        total = score.overall(scores)
        if not total.episodes:
            raise SimulationError(
                f"{self.path}: all {total.errors} episodes ended in an environment error, "
                f"the first:\n{records[0].error}\nFix it, remove the folder {self.path}, and evaluate again."
            )
        filmed = [(self.path / record.video).with_suffix(".png") for record in records if record.video]
        strips = [strip for strip in filmed if strip.is_file()]  # a user may have deleted some
        if strips:
            video.write_sheet(self.path / "sheet.png", strips)
        incomplete = score.errors_notice(total)
        notices = [*([incomplete] if incomplete else []), *self.described["notices"]]
        if incomplete:
            log.error("%s", incomplete)
        content = {
            **self.identity,
            "overall": total.to_json(),
            "tasks": {
                task: {"instruction": _instruction(records, task), **task_score.to_json()}
                for task, task_score in scores.items()
            },
            "complete": not incomplete,
            "notices": notices,
            **{key: self.described[key] for key in ("versions", "software", "renderer")},
            "seconds": seconds,
        }
        files.write_atomic(result_file, json.dumps(content, indent=2) + "\n")
        name = self.identity["protocol"]["name"]
        return Result(self.path, name, scores, total, tuple(records), tuple(notices), seconds)


def _instruction(records: list[Record], task: str) -> str:
    return next(record.instruction for record in records if record.task == task)


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
