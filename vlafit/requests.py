"""Check what an actor is asked: observations, keys and committed chunks, with the same words near and far.

A local policy, a client and a server call this before anything else, so that what one of them refuses no
other answers.
"""

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlafit.errors import ConfigError, EmbodimentError
from vlafit.execution import checked_guidance
from vlafit.observations import is_unicode, observation, short
from vlafit.types import Actor, Committed, Embodiment, EpisodeKey, Observation

LARGEST = 2**64 - 1  # of a key's numbers: what a frame can hold


@dataclass(frozen=True)
class Request:
    """One observation that waits for its chunk."""

    observation: Observation
    key: EpisodeKey
    committed: Committed | None = None


@dataclass(frozen=True)
class Expected:
    """What an actor can be asked."""

    embodiment: Embodiment
    history: int = 1
    """Observations that it reads, the newest included."""
    guided: bool = False
    """Whether it can continue a chunk that is being executed."""
    instructed: bool = True
    """Whether it reads an instruction."""
    cameras: tuple[str, ...] | None = None
    """Cameras that it looks at; None: all of the robot's."""
    fate_of_invalid: str = ""
    """What is executed where its tokens make no chunk of actions; "": it answers with numbers."""

    @property
    def seen(self) -> tuple[str, ...]:
        """The names of the cameras that it looks at."""
        return tuple(c.name for c in self.embodiment.cameras) if self.cameras is None else self.cameras


@runtime_checkable
class ExpectingActor(Protocol):
    """An actor that says what it can be asked."""

    @property
    def expected(self) -> Expected:
        """What it can be asked."""
        ...


def expected_of(actor: Actor, robot: Embodiment) -> Expected:
    """Return what an actor can be asked; one that does not say reads all that `robot` shows."""
    return actor.expected if isinstance(actor, ExpectingActor) else Expected(robot)


def checked_requests(
    observations: Sequence[Observation],
    keys: Sequence[EpisodeKey],
    committed: Sequence[Committed | None] | None,
    expected: Expected,
) -> list[Request]:
    """Return the requests with plain arrays in them.

    Raises EmbodimentError or ConfigError that names the observation, and everything that is wrong with it.
    """
    for name, values in (("observations", observations), ("keys", keys), ("committed", committed)):
        if isinstance(values, Observation | EpisodeKey | Committed | str) or not (
            (values is None and name == "committed") or isinstance(values, Sequence)
        ):
            raise ConfigError(f"{name}: must be a list, one for each row, not {short(values)}")
    if len(observations) != len(keys):
        raise ConfigError(f"{len(observations)} observations with {len(keys)} keys: each needs its own")
    lefts = [None] * len(keys) if committed is None else committed
    if len(lefts) != len(keys):
        raise ConfigError(f"{len(keys)} observations with {len(lefts)} of committed: each needs its own")
    requests = []
    for i, (seen, key, left) in enumerate(zip(observations, keys, lefts, strict=True)):
        where = f"observation {i}"
        requests.append(
            Request(
                _observation(seen, expected, where),
                checked_key(key, where),
                checked_left(left, expected, where),
            )
        )
    return requests


def _observation(seen: Any, expected: Expected, where: str) -> Observation:
    if not isinstance(seen, Observation):
        raise EmbodimentError(f"{where}: must be a vlafit.types.Observation, not {short(seen)}")
    try:
        checked = observation(
            seen.images, seen.state, seen.instruction, expected.embodiment, instructed=expected.instructed
        )
        past = checked_past(seen.past, checked.instruction, expected)
    except EmbodimentError as error:
        raise EmbodimentError(f"{where}: {error}") from None
    return dataclasses.replace(checked, past=past)


def checked_past(past: Any, instruction: str, expected: Expected) -> tuple[Observation, ...]:
    """Return the earlier observations, oldest first. Raises EmbodimentError for more than are read."""
    if not isinstance(past, Sequence) or len(past) > max(0, expected.history - 1):
        given = len(past) if isinstance(past, Sequence) else short(past)
        raise EmbodimentError(
            f"past: must be a list of at most {expected.history - 1} observations, not {given}"
        )
    earlier = []
    for step in past:
        if not isinstance(step, Observation):
            raise EmbodimentError(f"past: must hold observations, not {short(step)}")
        try:
            checked = observation(
                step.images, step.state, instruction, expected.embodiment, instructed=expected.instructed
            )
        except EmbodimentError as error:
            raise EmbodimentError(f"past: {error}") from None
        earlier.append(checked)
    return tuple(earlier)


def checked_key(key: Any, where: str) -> EpisodeKey:
    """Return the key with Python's own numbers in it, or raise ConfigError naming the field."""
    if not isinstance(key, EpisodeKey):
        raise ConfigError(f"{where}: key must be an EpisodeKey of seed, task and replan, not {short(key)}")
    numbers = {name: _whole(getattr(key, name)) for name in ("seed", "replan")}
    for name, number in numbers.items():
        if number is None or not 0 <= number <= LARGEST:
            given = short(getattr(key, name))
            raise ConfigError(f"{where}: key: {name} must be a whole number from 0 to 2**64 - 1, not {given}")
    if not isinstance(key.task, str) or not is_unicode(key.task):
        raise ConfigError(f"{where}: key: task must be a text, not {short(key.task)}")
    return EpisodeKey(numbers["seed"] or 0, str(key.task), numbers["replan"] or 0)


def checked_left(left: Any, expected: Expected, where: str) -> Committed | None:
    """Return what is committed with plain arrays in it, or raise ConfigError naming the field."""
    if left is None:
        return None
    where = f"{where}: committed"
    if not isinstance(left, Committed):
        raise ConfigError(f"{where} must be Committed, or None, not {short(left)}")
    if not expected.guided:
        raise ConfigError(f"{where}: this policy cannot continue a chunk (real-time chunking); leave it out")
    width = expected.embodiment.action.shape[0]
    actions = left.actions
    if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f" or actions.ndim != 2:
        raise ConfigError(f"{where}.actions must be float [steps, {width}], not {short(actions)}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
        actions = actions.astype(np.float32, copy=False)
    if actions.shape[1] != width or not len(actions) or not np.isfinite(actions).all():
        raise ConfigError(f"{where}.actions must be finite and [steps, {width}], not {actions.shape}")
    delay, end = _whole(left.delay), _whole(left.end)
    if delay is None or end is None or not 0 <= delay <= end <= len(actions):
        raise ConfigError(
            f"{where}: delay and end must be 0 <= delay <= end <= {len(actions)}, "
            f"not {short(left.delay)} and {short(left.end)}"
        )
    guidance = checked_guidance(f"{where}.guidance", left.guidance)
    return Committed(actions, delay, end, guidance)


def _whole(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
