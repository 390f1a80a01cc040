"""The folder of one evaluation: what it says of itself, what may be added to it, and what it comes to.

evaluation.json  what is evaluated, written first; a folder that says something else is refused
episodes.jsonl   one record an episode, forced to the disk as each ends; at the end sorted by task and seed
videos/          an mp4 and a film strip of each filmed episode;  sheet.png: all the strips
result.json      the scores, written last
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
    """None: the environment broke, see `error`."""
    steps: int
    replans: int
    wall_s: float
    """Seconds from its reset to its end, other episodes being played beside it."""
    error: str | None = None
    """The traceback, or the last words, of an environment that broke."""
    video: str | None = None
    """The mp4, relative to the folder; the film strip beside it ends in .png."""


@dataclass(frozen=True)
class Result:
    """What an evaluation came to. `notices` are sentences that must be shown wherever its numbers are."""

    folder: Path
    protocol: str
    tasks: dict[str, Score]
    overall: Score
    records: tuple[Record, ...]
    notices: tuple[str, ...]
    seconds: float

    @property
    def rate(self) -> float:
        """Share of the judged episodes that succeeded. An evaluation that judged none has no Result."""
        assert self.overall.rate is not None
        return self.overall.rate

    def __str__(self) -> str:
        """The table, and the notices below it."""
        return "\n".join([score.table(self.tasks), *self.notices])


class Folder:
    """The folder of one evaluation, and what is in it."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.described: dict[str, Any] = {}

    @property
    def is_described(self) -> bool:
        return bool(self.described)

    def open(self, resume: bool) -> None:
        """Take the folder, new or of the same evaluation; raise ConfigError for any other."""
        header = self.path / "evaluation.json"
        if not header.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and holds no evaluation; choose another folder")
            files.require_writable(self.path)
            return
        if not resume:
            raise ConfigError(f"{self.path} holds an evaluation already; resume it, or choose another folder")
        files.require_writable(self.path)
        try:
            there = json.loads(header.read_text(encoding="utf-8"))
            identity, self.described = dict(there["identity"]), dict(there["environment"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{header}: damaged ({error!r}); choose another folder") from error
        unlike = [
            f"{key}: {_short(identity.get(key))} there, {_short(value)} here"
            for key, value in self.identity.items()
            if key != "protocol" and identity.get(key) != value
        ]
        if unlike:
            listed = "\n  ".join(unlike)
            raise ConfigError(f"{self.path} holds another evaluation; choose another folder:\n  {listed}")

    def describe(self, ready: Ready, notice: str) -> None:
        """Write what is evaluated, or check that the environment is still the one the folder began with."""
        now = {
            "versions": dict(sorted(ready.versions.items())),
            "software": _versions(),
            "renderer": ready.embodiment.renderer,
            "instructions": {task: ready.instructions[task] for task in self.identity["tasks"]},
            "notices": [notice] if notice else [],
        }
        for line in now["notices"]:
            log.warning("%s", line)
        if self.described and self.described != now:
            unlike = [key for key in now if now[key] != self.described.get(key)]
            raise ConfigError(
                f"{self.path}: cannot go on: {', '.join(unlike)} changed since this evaluation began; "
                "choose another folder"
            )
        self.described = now
        header = {"identity": self.identity, "environment": now}
        files.write_atomic(self.path / "evaluation.json", json.dumps(header, indent=2) + "\n")

    def records(self) -> list[Record]:
        """Return the episodes that ended already."""
        path = self.path / "episodes.jsonl"
        return [build(Record, line, str(path)) for line in files.read_json_lines(path)]

    def keep(self, outcome: Outcome, hz: float) -> Record:
        """Write an episode's film, if it has one, and then its record."""
        job, film = outcome.job, None
        if job.film and outcome.frames:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{job.task}_{job.seed}")
            film = f"videos/{name}.mp4"
            video.write_mp4(self.path / film, outcome.frames, hz)
            how = {True: "success", False: "failure", None: "ERROR"}[outcome.success]
            label = f"{job.task}, seed {job.seed}: {how} after {outcome.steps} steps; told: {job.instruction}"
            strip = video.strip(outcome.frames, video.colour_of(outcome.success), label)
            video.write_png((self.path / film).with_suffix(".png"), strip)
        record = Record(
            job.task,
            job.trial,
            job.seed,
            job.instruction,
            outcome.success,
            outcome.steps,
            outcome.replans,
            outcome.wall_s,
            outcome.error,
            film,
        )
        if record.error is not None:
            log.warning(
                "task %s, seed %d: the environment broke:\n%s", record.task, record.seed, record.error
            )
        files.append_line(self.path / "episodes.jsonl", json.dumps(dataclasses.asdict(record)))
        return record

    def finish(self, records: list[Record], tasks: tuple[str, ...], seconds: float) -> Result:
        """Sort the records, and write sheet and result."""
        written = self.path / "result.json"
        if written.is_file():  # nothing was left to play
            try:
                seconds = float(json.loads(written.read_text(encoding="utf-8"))["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{written}: damaged ({error!r}); remove this file and evaluate again with --resume: "
                    "every episode is kept"
                ) from error
        lines = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        files.write_atomic(self.path / "episodes.jsonl", lines)
        scores = score.by_task(tasks, ((record.task, record.success) for record in records))
        total = score.overall(scores)
        if not total.episodes:
            raise SimulationError(
                f"{self.path}: all {total.errors} episodes ended in an error of the environment, "
                f"the first:\n{records[0].error}\nMend it, remove the folder {self.path}, and evaluate again."
            )
        filmed = [(self.path / record.video).with_suffix(".png") for record in records if record.video]
        strips = [strip for strip in filmed if strip.is_file()]  # unless somebody removed it
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
                task: {"instruction": self._told(records, task), **one.to_json()}
                for task, one in scores.items()
            },
            "complete": not incomplete,
            "notices": notices,
            **{key: self.described[key] for key in ("versions", "software", "renderer")},
            "seconds": seconds,
        }
        files.write_atomic(written, json.dumps(content, indent=2) + "\n")
        name = self.identity["protocol"]["name"]
        return Result(self.path, name, scores, total, tuple(records), tuple(notices), seconds)

    def _told(self, records: list[Record], task: str) -> str:
        return next(record.instruction for record in records if record.task == task)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vlafit", "numpy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the package runs from a checkout, or is not there
            pass
    return found
