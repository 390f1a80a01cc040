"""Evaluate an actor under a protocol: check that they are compatible, run the episodes, score them.

`vlafit.rollout.evaluation_folder` stores the episodes and resumes an interrupted evaluation.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vlafit import arguments, files, locks
from vlafit.agreement.camera_map import camera_options
from vlafit.config import LONGEST_S
from vlafit.envs import EnvSpec
from vlafit.envs.messages import Ready
from vlafit.errors import ConfigError, SimulationError
from vlafit.execution import Execution
from vlafit.observations import short
from vlafit.rollout import memory
from vlafit.rollout.against import compare, require_comparable
from vlafit.rollout.env_pool import EnvPool
from vlafit.rollout.evaluation_folder import EvaluationFolder, Result
from vlafit.rollout.play import EpisodeRequest, PlayOptions, play
from vlafit.rollout.prepared import LoadedActor, PreparedEvaluation, prepare, tasks_of
from vlafit.rollout.protocol import (
    AT_MOST,
    WIDTH,
    Protocol,
    load_protocol,
    require_actions,
    require_tasks,
    require_unseen,
    require_versions,
)
from vlafit.rollout.reach import require_reach
from vlafit.rollout.records import Record
from vlafit.rollout.shard import Shard, Start
from vlafit.types import Actor, Embodiment, renderer_notice, require_same

log = logging.getLogger(__name__)

MOST_WORKERS = 1024  # environment processes
LOCKED_BY = "vlafit eval"  # in messages about a folder that is in use
IN_FLIGHT = 16  # episodes that run at once for an actor that has no batch width

Progress = Callable[[int, int, Record], None]
"""Called with (episodes that have ended, total episodes, the last record)."""


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
    timeout_s: float | None = None,
    execution: Execution | None = None,
    retry_errors: bool = False,
    shard: Shard | None = None,
    against: str | Path | None = None,
    stop_early: bool = False,
) -> Result:
    """Run every episode of `protocol` with `actor` and score them, in the folder `out`.

    `workers`: environment processes (0: one per core, as far as they fit into the memory). `trials`:
    episodes per task instead of the protocol's; the first `videos` of them are filmed. No episode may start
    from a seed that the actor was trained on. `wrong_instruction`: run the tasks that have a partner in
    `swapped` with the partner's instruction, scored as the task itself. `images=False`: for actors that need
    no images. An environment that does not answer within `timeout_s` (the protocol's unless given) is an
    error of its episode. `execution`: how chunks are executed; without it, open loop, replanned as the
    protocol says. `retry_errors`: episodes that ended in an error are played again. `shard`: only this share
    of the episodes, in a folder of its own within `out`, to be merged by `vlafit.rollout.merge`. `against`:
    compare the result with that evaluation or run at the starts that both played. `stop_early`: with
    `against`, end as soon as the two are told apart.

    Finished episodes of the same evaluation in `out` are kept; any other content is an error. The result does
    not depend on workers or interruptions. Raises ConfigError, EmbodimentError or SimulationError before the
    first episode if actor, protocol and environment are incompatible.
    """
    started = time.monotonic()
    arguments.whole("evaluation: workers", workers, 0, MOST_WORKERS)
    arguments.whole("evaluation: videos", videos, 0, AT_MOST["trials"])
    if trials is not None:
        arguments.whole("evaluation: trials", trials, 1, AT_MOST["trials"])
    if timeout_s is not None:
        arguments.number("evaluation: timeout_s", timeout_s, 0, LONGEST_S, above=True)
    flags = {"resume": resume, "wrong_instruction": wrong_instruction, "images": images}
    for name, value in (flags | {"retry_errors": retry_errors, "stop_early": stop_early}).items():
        arguments.flag(f"evaluation: {name}", value)
    if against is not None:
        arguments.path("evaluation: against", against)
    for name, given, kind in (("execution", execution, Execution), ("shard", shard, Shard)):
        if given is not None and not isinstance(given, kind):
            raise ConfigError(f"evaluation: {name} must be {kind.__name__}, or None, not {short(given)}")
    prepared = prepare(
        actor,
        protocol if isinstance(protocol, Protocol) else load_protocol(arguments.path("protocol", protocol)),
        trials=trials,
        wrong_instruction=wrong_instruction,
        execution=execution,
        shard=shard,
        against=against,
        stop_early=stop_early,
    )
    protocol, robot = prepared.protocol, prepared.robot
    folder = EvaluationFolder(Path(out) / shard.folder if shard else Path(out), prepared.identity())
    with locks.exclusive(folder.path, LOCKED_BY):
        folder.open(resume)
        files.tidy(folder.path / "videos")
        wanted, order = prepared.wanted, prepared.order
        kept = folder.records()
        folder.require_counted(kept)
        done = {(record.task, record.seed): record for record in kept}
        remaining = [s for s in order if s not in done or (retry_errors and done[s].error is not None)]
        if (remaining and prepared.end(done) is None) or not folder.is_described:
            folder.reopen()
            with EnvPool(_env(protocol), timeout_s or protocol.timeout_s) as pool:
                begun = dict.fromkeys([remaining[0], remaining[-1]]) if remaining else ()
                seeds = dict.fromkeys(prepared.tasks, (protocol.first_seed, prepared.trials))
                ready = _described(pool, protocol, list(begun), seeds)
                said = prepared.trained.points if isinstance(prepared.trained, LoadedActor) else ()
                remedy = "" if robot is None else camera_options(robot, ready.embodiment, said)
                _require_playable(protocol, ready, robot, wrong_instruction, remedy)
                require_reach(prepared.trained, ready.embodiment, f"protocol {protocol.name!r}")
                notice = _renderer_notice(robot, ready.embodiment)
                folder.describe(ready, notice, prepared.agreement(ready.embodiment))
                folder.records()  # against the instructions, which may have been unknown until now
                width = prepared.trained.width if prepared.trained else IN_FLIGHT
                in_flight = min(width, len(remaining))
                cores, free = pool.room
                pool.fill(*memory.places(ready, workers, cores, in_flight, free))
                requests = _requests(protocol, remaining, ready, wrong_instruction, videos)
                play_options = PlayOptions(
                    ready.embodiment.action.shape[0],
                    width,
                    images,
                    prepared.execution or Execution(replan=protocol.replan),
                    in_order=stop_early,
                )
                for outcome in play(actor, protocol, requests, pool, play_options):
                    record = folder.keep(outcome, ready.embodiment.hz)
                    done[record.task, record.seed] = record
                    if progress:
                        progress(len(done), len(wanted), record)
                    if prepared.end(done) is not None:
                        break
        end = prepared.end(done)
        counted = dict.fromkeys(order[:end])
        more, notices = _verdict(done, counted, prepared, stopped=end is not None)
        records = [done[start] for start in wanted if start in counted]
        return folder.finish(records, prepared.tasks, round(time.monotonic() - started, 1), more, notices)


def _verdict(
    done: Mapping[Start, Record], counted: Collection[Start], prepared: PreparedEvaluation, *, stopped: bool
) -> tuple[dict[str, object], list[str]]:
    """Return what result.json says of the comparison, and the notices to show."""
    rival = prepared.rival
    if rival is None:
        return {}, []
    differs = require_comparable(
        rival, prepared.protocol, prepared.wrong_instruction, counted, prepared.execution
    )
    comparison = compare({start: done[start].success for start in counted}, rival, differs, stopped=stopped)
    early = [f"STOPPED EARLY: after {len(counted)} starts."] if stopped else []
    return {"against": comparison.to_json()}, [*early, str(comparison)]


def policy_width(
    protocol: Protocol | str | Path,
    out: Path,
    *,
    trials: int | None = None,
    wrong_instruction: bool = False,
) -> int:
    """Return the width of the policy's batches for an evaluation in the folder `out` (an actor's `width`).

    It is chosen once, from the number of episodes: never from workers or shards, and kept when an evaluation
    is continued, because it decides the last bits of the actions.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    folder = EvaluationFolder(Path(out), {})
    if folder.header.is_file():
        folder.read()
        kept = folder.identity.get("protocol", {})
        return int(kept.get("width", WIDTH))  # an earlier version always took as many
    episodes = len(tasks_of(protocol, wrong_instruction)) * len(protocol.seeds(trials))
    return min(protocol.width, episodes)


def preflight(
    protocol: Protocol | str | Path,
    embodiment: Embodiment,
    *,
    trials: int = 0,
    wrong_instruction: bool = False,
    seeds: Mapping[str, Collection[int]] | None = None,
    timeout_s: float | None = None,
) -> Embodiment:
    """Raise what `evaluate` would raise before its first episode, for a policy of `embodiment`.

    Return the robot of the protocol's environment.

    `seeds` are the training seeds by task; `trials` the episodes per task of a second evaluation, if more
    than the protocol's.

    Creates one environment, draws one picture and runs no episode: a training run checks at its start that
    the evaluation at its end is possible.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    most = max(trials, protocol.trials)
    require_unseen(protocol, most, seeds or {})
    tasks_of(protocol, wrong_instruction)
    begun = [(task, protocol.first_seed) for task in protocol.tasks[:2]]
    ready = _describe(protocol, timeout_s, begun, dict.fromkeys(protocol.tasks, (protocol.first_seed, most)))
    _require_playable(protocol, ready, embodiment, wrong_instruction)
    notice = _renderer_notice(embodiment, ready.embodiment)
    if notice:
        log.warning("%s", notice)
    return ready.embodiment


def robot_of(protocol: Protocol | str | Path, timeout_s: float | None = None) -> Embodiment:
    """Return the robot of a protocol's environment. Creates one environment and runs no episode."""
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol)
    return _describe(protocol, timeout_s).embodiment


def _describe(
    protocol: Protocol,
    timeout_s: float | None,
    starts: Sequence[Start] = (),
    seeds: Mapping[str, tuple[int, int]] | None = None,
) -> Ready:
    with EnvPool(_env(protocol), timeout_s or protocol.timeout_s) as pool:
        return _described(pool, protocol, starts, seeds)


def _env(protocol: Protocol) -> EnvSpec:
    """Return the environment; its horizon includes the steps before the policy's first observation."""
    steps = protocol.settle_steps + protocol.start_steps + protocol.horizon
    return dataclasses.replace(protocol.env, horizon=steps)


def _described(
    pool: EnvPool,
    protocol: Protocol,
    starts: Sequence[Start],
    seeds: Mapping[str, tuple[int, int]] | None,
) -> Ready:
    """Return the environment's description; an error about its horizon says what that is the sum of."""
    try:
        return pool.describe(starts, seeds)
    except SimulationError as error:
        parts = ("horizon", "settle_steps", "start_steps")
        given = [f"{part} = {getattr(protocol, part)}" for part in parts if getattr(protocol, part)]
        if len(given) < 2 or "horizon" not in str(error):
            raise
        summed = f"the horizon is the sum of {', '.join(given)} of protocol {protocol.name!r}"
        raise SimulationError(f"{error}; {summed}") from error


def _require_playable(
    protocol: Protocol,
    ready: Ready,
    trained: Embodiment | None,
    wrong_instruction: bool,
    remedy: str = "",
) -> None:
    """Raise unless protocol, environment and (if it was trained) policy are compatible.

    The error about another robot ends with the `remedy`.
    """
    require_versions(protocol, ready.versions)
    require_tasks(protocol, ready.instructions)
    missing = list(ready.missing)
    if missing:
        more = f" ({len(missing) - 1} other tasks lack starts, too)" if len(missing) > 1 else ""
        raise ConfigError(f"protocol {protocol.name!r}: {missing[0]}{more}")
    require_actions(protocol, ready.embodiment)
    if trained:
        require_same(trained, "the policy", ready.embodiment, f"protocol {protocol.name!r}", remedy)
    for task, partner in protocol.swapped.items() if wrong_instruction else ():
        if ready.instructions[task] == ready.instructions[partner]:
            raise ConfigError(
                f"protocol {protocol.name!r}: swapped: {task!r} and {partner!r} have the same instruction, "
                f"{ready.instructions[task]!r}; choose another partner"
            )


def _requests(
    protocol: Protocol,
    remaining: Iterable[Start],
    ready: Ready,
    wrong_instruction: bool,
    videos: int,
) -> list[EpisodeRequest]:
    requests = []
    for task, seed in remaining:
        trial = seed - protocol.first_seed
        instructed = protocol.swapped[task] if wrong_instruction else task
        sentence = protocol.sentence(task, seed, ready.instructions[instructed])
        requests.append(EpisodeRequest(task, trial, seed, sentence, trial < videos))
    return requests


def _renderer_notice(trained: Embodiment | None, env: Embodiment) -> str:
    if trained is None:
        return ""
    return renderer_notice("the policy was trained on", trained, "it is evaluated on", env)
