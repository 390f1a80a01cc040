"""Evaluation protocols: tasks, episodes, seeds and environment, read from a TOML file.

Results are comparable only under the same protocol, so a protocol holds everything that decides a result and
nothing that only decides how fast it is computed.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlafit import config, files, shipped
from vlafit.envs import RENDERER_VERSIONS, EnvSpec, Perturbation
from vlafit.errors import ConfigError, SimulationError, did_you_mean
from vlafit.types import Embodiment

BLANK = "."  # the sentence of instruction = "blank"
WIDTH = 16  # observations in a batch of the policy, unless a protocol says otherwise

AS_BEFORE: Mapping[str, Any] = {
    "width": WIDTH,
    "start_steps": 0,
    "instruction": "task",
    "paraphrases": {},
}
"""Options that protocols did not always have, with the value that was in force before. An option with this
value is left out of the hash, so that earlier results are still of the same protocol."""

AT_MOST = {"trials": 10**5, "horizon": 10**6, "replan": 10**6, "width": 2**12,
           "settle_steps": 10**6, "start_steps": 10**6}  # fmt: skip


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
    """Purpose of the protocol, in one sentence."""
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
    timeout_s: float = 120.0
    """An environment that does not answer within so many seconds is an error of its episode. Not in the hash,
    because it decides no result: a slow machine needs more."""
    width: int = WIDTH
    """Observations in one batch of the policy, filled up to it; an evaluation of fewer episodes takes as many
    as it has. In the hash, because it decides the last bits of the actions."""
    start_steps: int = 0
    """Perturbation of the start state: random actions, drawn from the seed, before the first observation.
    Those that already solve the task are drawn again, from the start: success is the policy's own."""
    instruction: Literal["task", "paraphrase", "blank"] = "task"
    """task: the task's own sentence. paraphrase: one of `paraphrases`, by the seed. blank: a full stop and no
    word, because policies refuse an empty sentence."""
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Task -> sentences that mean the same."""

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
        for key in ("trials", "horizon", "replan", "width"):
            value = getattr(self, key)
            require(value >= 1, f"{key}: must be at least 1, not {value}")
        for key, most in AT_MOST.items():
            value = getattr(self, key)
            require(value <= most, f"{key}: must be at most {most}, not {value}")
        require(
            self.replan <= self.horizon,
            f"replan: must not exceed horizon ({self.horizon}), is {self.replan}",
        )
        require(0 < self.timeout_s < math.inf, f"timeout_s: must be a positive number, is {self.timeout_s}")
        for key in ("first_seed", "settle_steps", "start_steps"):
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
        for task in self.paraphrases:
            require(
                task in self.tasks,
                f"paraphrases: {task!r} is not one of the protocol's tasks{did_you_mean(task, self.tasks)}",
            )
        if self.instruction == "paraphrase":
            without = [task for task in self.tasks if not self.paraphrases.get(task)]
            require(not without, f"paraphrases: there is none for {', '.join(without)}")
        require(
            self.instruction == "paraphrase" or not self.paraphrases,
            f'paraphrases: have no effect while instruction is {self.instruction!r}; set "paraphrase"',
        )
        for reference in self.references:
            require(
                0 <= reference.success <= 1,
                f"references: success of {reference.what!r} must be from 0 to 1, is {reference.success}",
            )

    def seeds(self, trials: int | None = None) -> range:
        """Return the seeds of each task's episodes; `trials` overrides their number."""
        return range(self.first_seed, self.first_seed + (self.trials if trials is None else trials))

    def played_in(self, python: str) -> "Protocol":
        """Return the protocol with another interpreter for its environments, which its hash leaves out."""
        return dataclasses.replace(self, env=dataclasses.replace(self.env, python=python))

    def sentence(self, task: str, seed: int, own: str) -> str:
        """Return the sentence that the policy is given at one start; `own` is the task's."""
        match self.instruction:
            case "task":
                return own
            case "blank":
                return BLANK
            case "paraphrase":
                sentences = self.paraphrases[task]
                return sentences[seed % len(sentences)]

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def sha256(self) -> str:
        """Return a hash of everything that decides a result: all but purpose, references and time limit.

        The version of the renderer belongs to it, if its pictures have changed.
        """
        return self.hashes()[0]

    def hashes(self) -> tuple[str, ...]:
        """Return its hash, and then that of a version before the renderer's pictures changed, if they did."""
        plain = self.to_json()
        beside = ("purpose", "references", "timeout_s")
        deciding = {k: v for k, v in plain.items() if k not in beside and AS_BEFORE.get(k) != v}
        del deciding["env"]["python"]  # decides nothing but versions, which results record
        if self.env.perturb == Perturbation():
            del deciding["env"]["perturb"]
        if self.env.name != "libero":
            del deciding["env"]["libero"]
        earlier = files.sha256_of_json(deciding)
        if self.env.renderer not in RENDERER_VERSIONS:
            return (earlier,)
        deciding["renderer_version"] = RENDERER_VERSIONS[self.env.renderer]
        return files.sha256_of_json(deciding), earlier


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
    """Raise ConfigError unless the protocol's own actions are actions of the robot."""
    length, action_dim = len(protocol.settle_action), embodiment.action.shape[0]
    if length not in (0, action_dim):
        raise ConfigError(
            f"protocol {protocol.name!r}: settle_action has {length} numbers, but an action of "
            f"{embodiment.name!r} has {action_dim}"
        )
    if protocol.start_steps and not embodiment.control.startswith("delta"):
        raise ConfigError(
            f"protocol {protocol.name!r}: start_steps: random actions from -1 to 1 only mean something to a "
            f"robot with delta control, and {embodiment.name!r} has {embodiment.control!r}; set it to 0"
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
