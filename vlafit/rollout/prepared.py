"""Check that an actor, a protocol and the options of an evaluation go together, and list the episodes."""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Structure
from typing import runtime_checkable

from vlafit.agreement import Item, chosen, evaluation_items, executed_items, invalid_items, replan_items
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.requests import expected_of
from vlafit.rollout.against import ALPHA, plain_execution, require_comparable, stop_after
from vlafit.rollout.earlier import Earlier, read_earlier
from vlafit.rollout.evaluation_folder import FORMAT
from vlafit.rollout.protocol import Protocol, require_unseen
from vlafit.rollout.records import Record
from vlafit.rollout.shard import Shard, Start
from vlafit.types import Actor, Embodiment, GuidedActor, chunk_of

log = logging.getLogger(__name__)


@runtime_checkable
class TrainedActor(Actor, Structure):
    """An actor trained on one robot, which knows the robot and the seeds it was trained on."""

    embodiment: Embodiment
    width: int
    seeds: Mapping[str, Collection[int]]  # task -> seeds of the demonstrations it was trained on

    def fingerprint(self) -> str:
        """Return all that decides its actions, including the checkpoint's hash."""
        ...


@runtime_checkable
class LoadedActor(TrainedActor, Structure):
    """An actor of a checkpoint's files, which says what was chosen when they were loaded."""

    points: Sequence[Item]
    """What was chosen, for the table of an evaluation."""
    executed: int
    """Steps of a chunk that the checkpoint's own program executes; 0: it does not say."""


@dataclass(frozen=True, kw_only=True)
class PreparedEvaluation:
    """An evaluation that was checked as far as is possible without an environment."""

    protocol: Protocol
    """With the width of the actor's batches."""
    actor_name: str
    """The fingerprint of a trained actor, or the class of another."""
    trained: TrainedActor | None
    tasks: tuple[str, ...]
    trials: int
    wrong_instruction: bool
    execution: Execution | None
    """None where it is the protocol's own, so that both are one evaluation."""
    shard: Shard | None
    wanted: Sequence[Start]
    """The starts of the shard; all without one."""
    rival: Earlier | None
    """The evaluation to compare with."""
    stop_early: bool
    chunk: int
    """Steps of the actor's chunks; 0 where it does not say."""

    @property
    def robot(self) -> Embodiment | None:
        """The robot that the actor was trained on; None if it was not trained."""
        return self.trained.embodiment if self.trained else None

    @property
    def order(self) -> Sequence[Start]:
        """The wanted starts as they are played; seed by seed if a stop must find a share of every task."""
        return sorted(self.wanted, key=lambda start: start[1]) if self.stop_early else self.wanted

    def identity(self) -> dict[str, object]:
        """Return what decides the result; a folder holds the episodes of one identity."""
        rival, early = self.rival, self.stop_early
        return {
            "format": FORMAT,
            "protocol": self.protocol.to_json(),
            "protocol_sha256": self.protocol.sha256(),
            "actor": self.actor_name,
            "tasks": list(self.tasks),
            "trials": self.trials,
            "wrong_instruction": self.wrong_instruction,
            **({"execution": plain_execution(self.execution)} if self.execution else {}),
            **({"shard": [self.shard.number, self.shard.count]} if self.shard else {}),
            **({"stop_early": {"against": rival.sha256(), "alpha": ALPHA}} if rival and early else {}),
        }

    def agreement(self, robot: Embodiment) -> list[Item]:
        """Return what policy and protocol say of the `robot`, and what was chosen in the protocol's place."""
        items = evaluation_items(self.robot, robot, "protocol") if self.robot else []
        own, used = Execution(replan=self.protocol.replan), self.execution
        if used is not None:
            for name, stated in plain_execution(own).items():
                items += chosen(
                    f"execution: {name}", str(stated), str(plain_execution(used)[name]), "protocol"
                )
        items += replan_items(used or own, self.chunk)
        if isinstance(self.trained, LoadedActor):
            items = [*self.trained.points, *items, *executed_items(used or own, self.trained.executed)]
        trials = str(self.protocol.trials), str(self.trials)
        items += chosen("episodes of each task", *trials, "protocol")
        if self.trained:
            items += invalid_items(expected_of(self.trained, robot).fate_of_invalid)
        told = "the partner's" if self.wrong_instruction else "the task's"
        items += chosen("instruction", "the task's", told, "protocol")
        return items

    def end(self, done: Mapping[Start, Record]) -> int | None:
        """Return after how many starts of `order` the two evaluations are told apart; None: not yet."""
        if self.rival is None or not self.stop_early:
            return None
        outcomes = {start: record.success for start, record in done.items()}
        return stop_after(self.order, outcomes, self.rival)


def prepare(
    actor: Actor,
    protocol: Protocol,
    *,
    trials: int | None,
    wrong_instruction: bool,
    execution: Execution | None,
    shard: Shard | None,
    against: str | Path | None,
    stop_early: bool,
) -> PreparedEvaluation:
    """Check the arguments of `evaluate` with each other. Raises ConfigError where they exclude each other."""
    tasks = tasks_of(protocol, wrong_instruction)
    execution = _execution(execution, protocol, actor)
    trained = _trained(actor)
    require_unseen(protocol, trials, trained.seeds if trained else {})
    if trained:
        protocol = dataclasses.replace(protocol, width=trained.width)
    starts = [(task, seed) for task in tasks for seed in protocol.seeds(trials)]
    chunk = chunk_of(actor)
    if execution and chunk:
        execution.require_chunk(chunk)
    if shorter := (execution or Execution(replan=protocol.replan)).shortened(chunk):
        log.warning("protocol %r: %s", protocol.name, shorter)
    rival = _rival(against, protocol, wrong_instruction, starts, stop_early, shard, execution)
    return PreparedEvaluation(
        protocol=protocol,
        actor_name=trained.fingerprint() if trained else type(actor).__name__,
        trained=trained,
        tasks=tasks,
        trials=trials or protocol.trials,
        wrong_instruction=wrong_instruction,
        execution=execution,
        shard=shard,
        wanted=_share(starts, shard),
        rival=rival,
        stop_early=stop_early,
        chunk=chunk,
    )


def tasks_of(protocol: Protocol, wrong_instruction: bool) -> tuple[str, ...]:
    """Return the tasks to play: with `wrong_instruction`, those that have a partner in `swapped`.

    Raises ConfigError if the protocol has no wrong instruction to give.
    """
    if not wrong_instruction:
        return protocol.tasks
    if protocol.instruction != "task":
        raise ConfigError(
            f"protocol {protocol.name!r}: instruction is {protocol.instruction!r}, so there is no wrong one "
            "to give; turn the wrong-instruction probe off"
        )
    tasks = tuple(task for task in protocol.tasks if task in protocol.swapped)
    if not tasks:
        raise ConfigError(
            f"protocol {protocol.name!r} has no swapped instructions: add a table [swapped] that maps tasks "
            "to a partner of the same scene, or turn the wrong-instruction probe off"
        )
    return tasks


def _share(starts: Sequence[Start], shard: Shard | None) -> list[Start]:
    """Return the starts of the shard; all without one. Raises ConfigError for a shard without any."""
    wanted = list(starts) if shard is None else shard.of(starts)
    if shard is not None and not wanted:
        raise ConfigError(
            f"--shard {shard.number}/{shard.count}: there are only {len(starts)} episodes; split them into "
            "fewer shards"
        )
    return wanted


def _rival(
    against: str | Path | None,
    protocol: Protocol,
    wrong_instruction: bool,
    starts: Sequence[Start],
    stop_early: bool,
    shard: Shard | None,
    execution: Execution | None,
) -> Earlier | None:
    """Return the evaluation to compare with. Raises ConfigError where the two cannot be compared."""
    if against is None:
        if stop_early:
            raise ConfigError("stop_early: needs an evaluation to compare with; give --against RUN")
        return None
    if stop_early and shard:
        raise ConfigError("stop_early: a shard cannot know when all are told apart; leave out one of the two")
    rival = read_earlier(against, wrong_instruction, protocol)
    require_comparable(rival, protocol, wrong_instruction, starts, execution)
    return rival


def _execution(execution: Execution | None, protocol: Protocol, actor: Actor) -> Execution | None:
    """Return the execution; None where it is the protocol's own, so that both are one evaluation."""
    if execution is None or execution == Execution(replan=protocol.replan):
        return None
    if execution.mode == "real_time" and not isinstance(actor, GuidedActor):
        raise ConfigError(
            f"execution real_time: actor {type(actor).__name__} cannot continue a chunk that is being "
            "executed; choose chunk or ensemble"
        )
    return execution


def _trained(actor: Actor) -> TrainedActor | None:
    """Return the actor if it is a TrainedActor, None if it has none of its attributes.

    One with some of the attributes is an error: without `seeds`, for example, it would be taken for an
    untrained actor, and its robot and starts would not be checked.
    """
    if isinstance(actor, TrainedActor):
        return actor
    attributes = ("embodiment", "width", "seeds", "fingerprint")
    present = [name for name in attributes if name in dir(actor)]
    if present:
        missing = ", ".join(name for name in attributes if name not in present)
        raise ConfigError(
            f"actor {type(actor).__name__} has {', '.join(present)} but lacks {missing}; "
            "implement all attributes of vlafit.rollout.prepared.TrainedActor, or none"
        )
    return None
