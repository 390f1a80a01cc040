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

from vlafit import shipped
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
    progress: Progress | None = None,
    timeout_s: float = 120.0,
    steps: int = 10,
    width: int = 16,
    seed: int = 0,
    device: str = "",
) -> Result:
    """Load a checkpoint (a folder, or the name of one that ships) and `evaluate` it.

    Its history says from which seeds it has seen demonstrations; no episode may start from those.
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
        training_seeds=checkpoints.read_lineage(folder).seeds,
        progress=progress,
        timeout_s=timeout_s,
    )


def preflight(
    protocol: Protocol | str | Path,
    embodiment: Embodiment,
    *,
    trials: int = 0,
    wrong_instruction: bool = False,
    training_seeds: Mapping[str, Collection[int]] | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Raise what `evaluate` would raise before its first episode, for a policy of `embodiment`.

    `trials` are those of a further evaluation, where they are more than the protocol's.

    It makes one environment and plays nothing: a training run asks at its beginning whether the evaluation at
    its end will be possible.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    require_unseen(protocol, max(trials, protocol.trials), training_seeds or {})
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
