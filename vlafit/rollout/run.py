"""One evaluation, from protocol to result, in a folder that a person can read and a killed run can resume.

evaluation.json  what is evaluated, written first; a folder that says something else is refused
episodes.jsonl   one record an episode, forced to the disk as each ends; at the end sorted by task and seed
videos/          an mp4 and a film strip of each filmed episode;  sheet.png: all the strips
result.json      the scores, written last
"""

import dataclasses
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Structure

from vlafit import files, score, shipped
from vlafit.config import build
from vlafit.errors import ConfigError, SimulationError
from vlafit.rollout import video
from vlafit.rollout.play import Job, Outcome, play
from vlafit.rollout.pool import Pool
from vlafit.rollout.protocol import (
    Protocol,
    load_protocol,
    require_actions,
    require_tasks,
    require_unseen,
    require_versions,
)
from vlafit.rollout.worker import Ready
from vlafit.score import Score
from vlafit.types import Actor, Embodiment, require_same

log = logging.getLogger(__name__)

FORMAT = 1  # of the evaluation folder
IN_FLIGHT = 16  # episodes played side by side for an actor that has no width of its own


@runtime_checkable
class TrainedActor(Actor, Structure):
    """An actor that was trained on one robot, and can say on which and from what."""

    embodiment: Embodiment
    width: int

    def fingerprint(self) -> str:
        """Return what decides its actions, a checkpoint's hash included."""
        ...


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


Progress = Callable[[int, int, Record], None]
"""Called with (episodes that ended, episodes in all, the record of the last)."""


def evaluate(
    actor: Actor,
    protocol: Protocol | str | Path,
    out: Path,
    *,
    workers: int = 0,
    trials: int | None = None,
    videos: int = 2,
    resume: bool = True,
    wrong_instruction: bool = False,
    training_seeds: Mapping[str, Collection[int]] | None = None,
    progress: Progress | None = None,
    images: bool = True,
    timeout_s: float = 120.0,
) -> Result:
    """Play every episode of `protocol` with `actor` and score them, in the folder `out`.

    `workers` environment processes (0: one a core); `trials` episodes a task instead of the protocol's, of
    which the first `videos` are filmed; `training_seeds`, of each task, are seeds no episode may start from.
    With `wrong_instruction`, tasks that have a partner in `swapped` are played, and judged, as ever, but the
    actor is given the partner's sentence. `images=False` is for actors that look at none. An environment that
    does not answer within `timeout_s` counts as broken.

    What `out` already holds of the same evaluation is kept; anything else there is refused. The result does
    not depend on workers or interruptions. Raises ConfigError, EmbodimentError or SimulationError before the
    first episode where actor, protocol and environment do not belong together.
    """
    began = time.monotonic()
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    for name, value, least in (("workers", workers, 0), ("videos", videos, 0), ("trials", trials, 1)):
        if value is not None and value < least:
            raise ConfigError(f"evaluation: {name} must be at least {least}, not {value}")
    require_unseen(protocol, trials, training_seeds or {})
    tasks = _tasks(protocol, wrong_instruction)
    trained = actor if isinstance(actor, TrainedActor) else None
    run = _Folder(
        Path(out),
        {
            "format": FORMAT,
            "protocol": protocol.to_json(),
            "protocol_sha256": protocol.sha256(),
            "actor": trained.fingerprint() if trained else type(actor).__name__,
            "tasks": list(tasks),
            "trials": trials or protocol.trials,
            "wrong_instruction": wrong_instruction,
        },
    )
    run.open(resume)
    done = {(record.task, record.seed): record for record in run.records()}
    wanted = [(task, i, seed) for task in tasks for i, seed in enumerate(protocol.seeds(trials))]
    todo = [(task, i, seed) for task, i, seed in wanted if (task, seed) not in done]
    if todo or not run.is_described:
        width = trained.width if trained else IN_FLIGHT
        processes = max(1, min(workers or _cores(), len(todo), width))
        slots = max(1, -(-min(width, len(todo)) // processes))
        env = dataclasses.replace(protocol.env, horizon=protocol.settle_steps + protocol.horizon)
        with Pool(env, processes, slots, timeout_s) as pool:
            ready = pool.describe()
            _require_playable(protocol, ready, trained.embodiment if trained else None)
            run.describe(ready, _renderer_notice(trained, ready.embodiment))
            jobs = _jobs(protocol, todo, ready, wrong_instruction, videos)
            dim = ready.embodiment.action.shape[0]
            for outcome in play(actor, protocol, jobs, pool, action_dim=dim, width=width, images=images):
                record = run.keep(outcome, ready.embodiment.hz)
                done[record.task, record.seed] = record
                if progress:
                    progress(len(done), len(wanted), record)
    return run.finish([done[task, seed] for task, _, seed in wanted], tasks, time.monotonic() - began)


def evaluate_checkpoint(
    path: str | Path,
    protocol: Protocol | str | Path,
    out: Path,
    *,
    workers: int = 0,
    trials: int | None = None,
    videos: int = 2,
    resume: bool = True,
    wrong_instruction: bool = False,
    training_seeds: Mapping[str, Collection[int]] | None = None,
    progress: Progress | None = None,
    timeout_s: float = 120.0,
    steps: int = 10,
    width: int = 16,
    seed: int = 0,
    device: str = "",
) -> Result:
    """Load a checkpoint (a folder, or the name of one that ships) and `evaluate` it.

    `steps`, `width` and `seed` are those of `PolicyActor`; `device` is torch's name, the GPU if there is one
    when empty. Further arguments and errors as for `evaluate`.
    """
    import torch

    from vlafit import checkpoints
    from vlafit.actor import PolicyActor

    folder = shipped.find("checkpoint", path)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = checkpoints.load(folder, device=torch.device(chosen))
    if loaded.codec is None:
        raise ConfigError(
            f"{folder}: a {loaded.report.form} checkpoint has no codec, which says what its numbers mean "
            "to a robot; fine-tune it first, and evaluate what that saves"
        )
    identity = f"checkpoint sha256:{checkpoints.digest(folder)}"
    actor = PolicyActor(loaded.policy, loaded.codec, steps=steps, width=width, seed=seed, identity=identity)
    return evaluate(
        actor,
        protocol,
        out,
        workers=workers,
        trials=trials,
        videos=videos,
        resume=resume,
        wrong_instruction=wrong_instruction,
        training_seeds=training_seeds,
        progress=progress,
        timeout_s=timeout_s,
    )


def preflight(
    protocol: Protocol | str | Path,
    embodiment: Embodiment,
    *,
    wrong_instruction: bool = False,
    training_seeds: Mapping[str, Collection[int]] | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Raise what `evaluate` would raise before its first episode, for a policy of `embodiment`.

    It makes one environment and plays nothing: a training run asks at its beginning whether the evaluation at
    its end will be possible.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    require_unseen(protocol, None, training_seeds or {})
    _tasks(protocol, wrong_instruction)
    env = dataclasses.replace(protocol.env, horizon=protocol.settle_steps + protocol.horizon)
    with Pool(env, 1, 1, timeout_s) as pool:
        _require_playable(protocol, pool.describe(), embodiment)


def _require_playable(protocol: Protocol, ready: Ready, trained: Embodiment | None) -> None:
    """Raise unless protocol, environment and (if it was trained) policy belong together."""
    require_versions(protocol, ready.versions)
    require_tasks(protocol, ready.instructions)
    require_actions(protocol, ready.embodiment)
    if trained:
        require_same(trained, "the policy", ready.embodiment, f"protocol {protocol.name!r}")


def _tasks(protocol: Protocol, wrong_instruction: bool) -> tuple[str, ...]:
    if not wrong_instruction:
        return protocol.tasks
    tasks = tuple(task for task in protocol.tasks if task in protocol.swapped)
    if not tasks:
        raise ConfigError(
            f"protocol {protocol.name!r} has no swapped instructions: add a table [swapped] that gives tasks "
            "a partner of the same scene, or leave the wrong-instruction probe out"
        )
    return tasks


def _jobs(
    protocol: Protocol,
    todo: Iterable[tuple[str, int, int]],
    ready: Ready,
    wrong_instruction: bool,
    videos: int,
) -> list[Job]:
    jobs = []
    for task, trial, seed in todo:
        own = ready.instructions[task]
        instruction = ready.instructions[protocol.swapped[task]] if wrong_instruction else own
        if wrong_instruction and instruction == own:
            raise ConfigError(
                f"protocol {protocol.name!r}: swapped: {task!r} and {protocol.swapped[task]!r} have the same "
                f"sentence, {own!r}: it tells nothing apart; choose another partner"
            )
        jobs.append(Job(task, trial, seed, instruction, trial < videos))
    return jobs


def _renderer_notice(trained: TrainedActor | None, env: Embodiment) -> str:
    theirs = trained.embodiment.renderer if trained else ""
    if not theirs or theirs == env.renderer:
        return ""
    return (
        f"RENDERER: the policy was trained on pictures made by {theirs!r} and is evaluated on pictures made "
        f"by {env.renderer!r}; the difference may cost it successes."
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vlafit", "numpy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the package runs from a checkout, or is not there
            pass
    return found


class _Folder:
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
            identity, self.described = there["identity"], there["environment"]
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
        lines = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        files.write_atomic(self.path / "episodes.jsonl", lines)
        scores = score.by_task(tasks, ((record.task, record.success) for record in records))
        total = score.overall(scores)
        if not total.episodes:
            raise SimulationError(
                f"{self.path}: all {total.errors} episodes ended in an error of the environment, "
                f"the first:\n{records[0].error}\nMend it and evaluate again, in another folder."
            )
        strips = [(self.path / record.video).with_suffix(".png") for record in records if record.video]
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
            "seconds": round(seconds, 1),
        }
        files.write_atomic(self.path / "result.json", json.dumps(content, indent=2) + "\n")
        name = self.identity["protocol"]["name"]
        return Result(self.path, name, scores, total, tuple(records), tuple(notices), seconds)

    def _told(self, records: list[Record], task: str) -> str:
        return next(record.instruction for record in records if record.task == task)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
