"""One evaluation, from protocol to result: check that everything belongs together, play, score.

What is kept of it, and how an interrupted one goes on, is `vlafit.rollout.folder`'s.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol as Structure
from typing import runtime_checkable

from vlafit.errors import ConfigError
from vlafit.rollout.folder import FORMAT, Folder, Record, Result
from vlafit.rollout.play import Job, play
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
from vlafit.types import Actor, Embodiment, renderer_notice, require_same

log = logging.getLogger(__name__)

IN_FLIGHT = 16  # episodes played side by side for an actor that has no width of its own


@runtime_checkable
class TrainedActor(Actor, Structure):
    """An actor that was trained on one robot, and can say on which and from what."""

    embodiment: Embodiment
    width: int
    seeds: Mapping[str, Collection[int]]  # task -> recorded seeds that it has learned from

    def fingerprint(self) -> str:
        """Return what decides its actions, a checkpoint's hash included."""
        ...


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
    progress: Progress | None = None,
    images: bool = True,
    timeout_s: float = 120.0,
) -> Result:
    """Play every episode of `protocol` with `actor` and score them, in the folder `out`.

    `workers` environment processes (0: one a core); `trials` episodes a task instead of the protocol's, of
    which the first `videos` are filmed. No episode may start from a seed that a trained actor learned from.
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
    tasks = _tasks(protocol, wrong_instruction)
    trained = _trained(actor)
    require_unseen(protocol, trials, trained.seeds if trained else {})
    robot = trained.embodiment if trained else None
    run = Folder(
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
            _require_playable(protocol, ready, robot, wrong_instruction)
            run.describe(ready, _renderer_notice(robot, ready.embodiment))
            jobs = _jobs(protocol, todo, ready, wrong_instruction, videos)
            dim = ready.embodiment.action.shape[0]
            for outcome in play(actor, protocol, jobs, pool, action_dim=dim, width=width, images=images):
                record = run.keep(outcome, ready.embodiment.hz)
                done[record.task, record.seed] = record
                if progress:
                    progress(len(done), len(wanted), record)
    return run.finish(
        [done[task, seed] for task, _, seed in wanted], tasks, round(time.monotonic() - began, 1)
    )


def preflight(
    protocol: Protocol | str | Path,
    embodiment: Embodiment,
    *,
    trials: int = 0,
    wrong_instruction: bool = False,
    seeds: Mapping[str, Collection[int]] | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Raise what `evaluate` would raise before its first episode, for a policy of `embodiment`.

    `seeds` are those that it will have learned from, by task; `trials` are those of a further
    evaluation, where they are more than the protocol's.

    It makes one environment and plays nothing: a training run asks at its beginning whether the evaluation at
    its end will be possible.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    require_unseen(protocol, max(trials, protocol.trials), seeds or {})
    _tasks(protocol, wrong_instruction)
    env = dataclasses.replace(protocol.env, horizon=protocol.settle_steps + protocol.horizon)
    with Pool(env, 1, 1, timeout_s) as pool:
        ready = pool.describe()
    _require_playable(protocol, ready, embodiment, wrong_instruction)
    notice = _renderer_notice(embodiment, ready.embodiment)
    if notice:
        log.warning("%s", notice)


def _require_playable(
    protocol: Protocol, ready: Ready, trained: Embodiment | None, wrong_instruction: bool
) -> None:
    """Raise unless protocol, environment and (if it was trained) policy belong together."""
    require_versions(protocol, ready.versions)
    require_tasks(protocol, ready.instructions)
    require_actions(protocol, ready.embodiment)
    if trained:
        require_same(trained, "the policy", ready.embodiment, f"protocol {protocol.name!r}")
    for task, partner in protocol.swapped.items() if wrong_instruction else ():
        if ready.instructions[task] == ready.instructions[partner]:
            raise ConfigError(
                f"protocol {protocol.name!r}: swapped: {task!r} and {partner!r} have the same sentence, "
                f"{ready.instructions[task]!r}: it tells nothing apart; choose another partner"
            )


def _trained(actor: Actor) -> TrainedActor | None:
    """Return the actor if it was trained, None if it never was. One that tells but half of it is refused.

    Otherwise one that forgot `seeds`, say, would pass for an actor without a robot, and nothing be compared.
    """
    if isinstance(actor, TrainedActor):
        return actor
    parts = ("embodiment", "width", "seeds", "fingerprint")
    told = [name for name in parts if name in dir(actor)]
    if told:
        lacks = ", ".join(name for name in parts if name not in told)
        raise ConfigError(
            f"actor {type(actor).__name__} has {', '.join(told)} as a trained one has, but lacks {lacks}: "
            "give it all of vlafit.rollout.run.TrainedActor, or none"
        )
    return None


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
        told = protocol.swapped[task] if wrong_instruction else task
        jobs.append(Job(task, trial, seed, ready.instructions[told], trial < videos))
    return jobs


def _renderer_notice(trained: Embodiment | None, env: Embodiment) -> str:
    if trained is None:
        return ""
    return renderer_notice("the policy was trained on", trained, "it is evaluated on", env)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
