"""What a protocol file may say: how a policy is judged, down to the seeds.

Two results are comparable only under the same protocol, so everything that decides a result stands here, and
nothing of how fast it is computed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlafit import config, shipped
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError, SimulationError, did_you_mean
from vlafit.types import Embodiment


@dataclass(frozen=True)
class Reference:
    """A result that somebody published, to compare with."""

    what: str
    """The policy, and how it was trained."""
    success: float
    """Share of successes, in [0, 1]."""
    source: str
    """Where the number comes from: a paper's table, a page, or a file of eval/results/."""
    note: str = ""
    """In what its protocol differs from this one."""


@dataclass(frozen=True)
class Protocol:
    """How a policy is judged."""

    name: str
    """Name of the protocol; its numbers are logged as eval/NAME/success."""
    env: EnvSpec
    """The environment: its name, renderer, cameras and image size."""
    tasks: tuple[str, ...]
    """Tasks, in the order of the result table."""
    trials: int
    """Episodes of each task."""
    first_seed: int
    """Trial i of every task starts from seed first_seed + i; tasks that share a scene share their starts."""
    horizon: int
    """Control steps after which an episode without success is a failure; settle steps are not counted."""
    replan: int
    """Steps of each action chunk that are executed before the policy is asked again."""
    purpose: str = ""
    """One sentence: what the protocol measures."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the simulator that the protocol is for; another one is an error."""
    settle_steps: int = 0
    """Steps of `settle_action` before the policy sees anything, while objects come to rest."""
    settle_action: tuple[float, ...] = ()
    """The action that does nothing. Empty: zeros."""
    success: Literal["any_step"] = "any_step"
    """An episode succeeds, and ends, at the first step that the environment calls a success."""
    swapped: dict[str, str] = field(default_factory=dict)
    """Task -> the task of the same scene whose sentence the wrong-instruction probe gives instead."""
    references: tuple[Reference, ...] = ()
    """Published results under this protocol, or nearly."""

    def __post_init__(self) -> None:
        def need(true: bool, what: str) -> None:
            if not true:
                raise ConfigError(what)

        need(bool(self.name) and "/" not in self.name, f"name: {self.name!r} cannot name a result")
        need(len(self.tasks) > 0, "tasks: there is none; name at least one")
        twice = sorted({t for t in self.tasks if self.tasks.count(t) > 1})
        need(not twice, f"tasks: named twice: {', '.join(twice)}")
        for key in ("trials", "horizon", "replan"):
            value = getattr(self, key)
            need(value >= 1, f"{key}: must be at least 1, not {value}")
        for key in ("first_seed", "settle_steps"):
            value = getattr(self, key)
            need(value >= 0, f"{key}: cannot be negative, but is {value}")
        need(self.env.horizon == 0, "env.horizon: leave it out; the protocol's own horizon counts")
        need(
            not self.settle_action or self.settle_steps > 0,
            "settle_action: is given, but settle_steps is 0; set both or none",
        )
        for task, partner in self.swapped.items():
            need(
                task in self.tasks,
                f"swapped: {task!r} is none of the protocol's tasks{did_you_mean(task, self.tasks)}",
            )
            need(task != partner, f"swapped: {task!r} is its own partner; name another task of its scene")
        for one in self.references:
            need(
                0 <= one.success <= 1,
                f"references: success of {one.what!r} is a share from 0 to 1, not {one.success}",
            )

    def seeds(self, trials: int | None = None) -> range:
        """Return the seeds of each task's episodes; `trials` overrides their number."""
        return range(self.first_seed, self.first_seed + (self.trials if trials is None else trials))

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def sha256(self) -> str:
        """Return a hash of everything that decides a result: purpose and references do not."""
        plain = self.to_json()
        deciding = {k: v for k, v in plain.items() if k not in ("purpose", "references")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Read a protocol: a path, or the name of one that ships.

    Raises ConfigError naming the file, the key and how to mend it.
    """
    return config.read(Protocol, shipped.find("protocol", name_or_path), "protocol")


def require_versions(protocol: Protocol, versions: Mapping[str, str]) -> None:
    """Raise SimulationError unless the environment has the versions that the protocol is for."""
    wrong = [
        f"{package} {versions.get(package, 'unknown')} is here, {wanted} is asked for"
        for package, wanted in sorted(protocol.versions.items())
        if versions.get(package) != wanted
    ]
    if wrong:
        raise SimulationError(
            f"protocol {protocol.name!r}: the simulator differs: {'; '.join(wrong)}. Results would not be "
            "comparable: install that version, or write a protocol for this one."
        )


def require_tasks(protocol: Protocol, tasks: Collection[str]) -> None:
    """Raise ConfigError for a task, or a partner task, that the environment does not have."""
    for key, wanted in (("tasks", protocol.tasks), ("swapped", tuple(protocol.swapped.values()))):
        for task in wanted:
            if task not in tasks:
                raise ConfigError(
                    f"protocol {protocol.name!r}: {key}: environment {protocol.env.name!r} has no task "
                    f"{task!r}{did_you_mean(task, tasks)}"
                )


def require_actions(protocol: Protocol, embodiment: Embodiment) -> None:
    """Raise ConfigError unless the action of the settle steps is one of the environment's robot."""
    given, wanted = len(protocol.settle_action), embodiment.action.shape[0]
    if given not in (0, wanted):
        raise ConfigError(
            f"protocol {protocol.name!r}: settle_action has {given} numbers, an action of "
            f"{embodiment.name!r} has {wanted}"
        )


def require_unseen(
    protocol: Protocol, trials: int | None, training_seeds: Mapping[str, Collection[int]]
) -> None:
    """Raise ConfigError if an episode would start where a recorded demonstration of its task did."""
    for task in protocol.tasks:
        seen = sorted(set(protocol.seeds(trials)) & set(training_seeds.get(task, ())))
        if seen:
            listed = ", ".join(map(str, seen[:5])) + (", ..." if len(seen) > 5 else "")
            raise ConfigError(
                f"protocol {protocol.name!r}: {len(seen)} seeds of task {task!r} are those of recorded "
                f"demonstrations ({listed}); an evaluation must start where no demonstration did: choose "
                "another first_seed"
            )
