"""Evaluation protocols: tasks, episodes, seeds and environment, read from a TOML file.

Results are comparable only under the same protocol, so a protocol holds everything that decides a result and
nothing that only decides how fast it is computed.
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
    """A published result to compare with."""

    what: str
    """The policy and how it was trained."""
    success: float
    """Success rate, in [0, 1]."""
    source: str
    """Source of the number: a paper's table, a page, or a file of eval/results/."""
    note: str = ""
    """How its protocol differs from this one."""


@dataclass(frozen=True)
class Protocol:
    """How a policy is evaluated."""

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
    """Steps of each action chunk that are executed before the policy is called again."""
    purpose: str = ""
    """What the protocol measures, in one sentence."""
    versions: dict[str, str] = field(default_factory=dict)
    """Required versions of the simulator's packages; any other version is an error."""
    settle_steps: int = 0
    """Steps of `settle_action` before the first observation, while objects come to rest."""
    settle_action: tuple[float, ...] = ()
    """The action that does nothing. Empty: zeros."""
    success: Literal["any_step"] = "any_step"
    """An episode succeeds, and ends, at the first step that the environment reports as a success."""
    swapped: dict[str, str] = field(default_factory=dict)
    """Task -> the task of the same scene whose instruction the wrong-instruction probe gives instead."""
    references: tuple[Reference, ...] = ()
    """Published results under this protocol or a similar one."""

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        require(
            bool(self.name) and "/" not in self.name,
            f"name: {self.name!r} is invalid; it must not be empty or contain '/'",
        )
        require(len(self.tasks) > 0, "tasks: the list is empty; name at least one")
        duplicates = sorted({t for t in self.tasks if self.tasks.count(t) > 1})
        require(not duplicates, f"tasks: listed twice: {', '.join(duplicates)}")
        for key in ("trials", "horizon", "replan"):
            value = getattr(self, key)
            require(value >= 1, f"{key}: must be at least 1, not {value}")
        require(
            self.replan <= self.horizon,
            f"replan: must not exceed horizon ({self.horizon}), is {self.replan}",
        )
        for key in ("first_seed", "settle_steps"):
            value = getattr(self, key)
            require(value >= 0, f"{key}: must not be negative, is {value}")
        require(self.env.horizon == 0, "env.horizon: remove it; the protocol's own horizon applies")
        require(
            not self.settle_action or self.settle_steps > 0,
            "settle_action: has no effect while settle_steps is 0; set both or neither",
        )
        for task, partner in self.swapped.items():
            require(
                task in self.tasks,
                f"swapped: {task!r} is not one of the protocol's tasks{did_you_mean(task, self.tasks)}",
            )
            require(task != partner, f"swapped: {task!r} is its own partner; name another task of its scene")
        for reference in self.references:
            require(
                0 <= reference.success <= 1,
                f"references: success of {reference.what!r} must be from 0 to 1, is {reference.success}",
            )

    def seeds(self, trials: int | None = None) -> range:
        """Return the seeds of each task's episodes; `trials` overrides their number."""
        return range(self.first_seed, self.first_seed + (self.trials if trials is None else trials))

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def sha256(self) -> str:
        """Return a hash of everything that decides a result (all but purpose and references)."""
        plain = self.to_json()
        deciding = {k: v for k, v in plain.items() if k not in ("purpose", "references")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Read a protocol: a path, or the name of a shipped one.

    Raises ConfigError naming the file, the key and the fix.
    """
    return config.read(Protocol, shipped.find("protocol", name_or_path), "protocol")


def require_versions(protocol: Protocol, versions: Mapping[str, str]) -> None:
    """Raise SimulationError unless the environment has the versions that the protocol requires."""
    wrong = [
        f"{package} {versions.get(package, 'unknown')} is installed, {wanted} is required"
        for package, wanted in sorted(protocol.versions.items())
        if versions.get(package) != wanted
    ]
    if wrong:
        raise SimulationError(
            f"protocol {protocol.name!r}: wrong simulator version: {'; '.join(wrong)}. Results would not be "
            "comparable: install the required version, or write a protocol for the installed one."
        )


def require_tasks(protocol: Protocol, tasks: Collection[str]) -> None:
    """Raise ConfigError if the environment lacks a task or a partner task."""
    for key, wanted in (("tasks", protocol.tasks), ("swapped", tuple(protocol.swapped.values()))):
        for task in wanted:
            if task not in tasks:
                raise ConfigError(
                    f"protocol {protocol.name!r}: {key}: environment {protocol.env.name!r} has no task "
                    f"{task!r}{did_you_mean(task, tasks)}"
                )


def require_actions(protocol: Protocol, embodiment: Embodiment) -> None:
    """Raise ConfigError unless `settle_action` has the robot's number of action dimensions."""
    length, action_dim = len(protocol.settle_action), embodiment.action.shape[0]
    if length not in (0, action_dim):
        raise ConfigError(
            f"protocol {protocol.name!r}: settle_action has {length} numbers, but an action of "
            f"{embodiment.name!r} has {action_dim}"
        )


def require_unseen(
    protocol: Protocol, trials: int | None, training_seeds: Mapping[str, Collection[int]]
) -> None:
    """Raise ConfigError if an episode would start from the seed of a training demonstration of its task."""
    for task in protocol.tasks:
        seen = sorted(set(protocol.seeds(trials)) & set(training_seeds.get(task, ())))
        if seen:
            listed = ", ".join(map(str, seen[:5])) + (", ..." if len(seen) > 5 else "")
            raise ConfigError(
                f"protocol {protocol.name!r}: {len(seen)} seeds of task {task!r} are also seeds of recorded "
                f"demonstrations ({listed}); an evaluation must use other starts than training: choose "
                "another first_seed"
            )
