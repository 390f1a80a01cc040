"""The robot's side of the house: numpy, physical units, no batch axis, the instruction as text.

Nothing here imports torch. The model's side (`Batch`) lives in `vlafit.nn.batch`, and `vlafit.codec` is the
only door between the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import EmbodimentError

NOTHING: Mapping[str, NDArray] = MappingProxyType({})


@dataclass(frozen=True)
class Feature:
    """A named column, or a camera.

    A camera's shape is (height, width, 3) and its pixels are uint8 RGB; a column's shape is (dimensions,).
    `labels`, when given, names each dimension of a column.
    """

    name: str
    shape: tuple[int, ...]
    unit: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embodiment:
    """What a dataset, an environment and a checkpoint each declare about the robot.

    `control` says what an action means (for example ``"delta_position"``). `hz` is the control rate. Where a
    checkpoint's files do not tell, `control` is empty and `hz` is 0.
    `renderer` says what made the pixels: ``"camera"`` for a real robot, ``"ray"``, ``"egl"`` or ``"osmesa"``
    for simulations, or empty where a file does not tell.
    """

    name: str
    cameras: tuple[Feature, ...]
    state: Feature
    action: Feature
    hz: float
    control: str
    renderer: str = ""

    def camera(self, name: str) -> Feature:
        """Return the camera called `name`, or raise EmbodimentError naming those there are."""
        for camera in self.cameras:
            if camera.name == name:
                return camera
        have = ", ".join(c.name for c in self.cameras)
        raise EmbodimentError(f"embodiment {self.name!r} has no camera {name!r}; it has: {have}")


def differences(one: Embodiment, other: Embodiment) -> list[str]:
    """Name every field in which two embodiments cannot work together, the renderer aside.

    Units, labels, control mode and rate count only where both sides give them; the embodiment's name never.
    """
    found = []

    def unlike(what: str, a: object, b: object) -> None:
        if a != b:
            found.append(f"{what}: {a} here, {b} there")

    unlike("cameras", sorted(c.name for c in one.cameras), sorted(c.name for c in other.cameras))
    theirs = {c.name: c for c in other.cameras}
    for camera in one.cameras:
        if camera.name in theirs:
            unlike(f"size of camera {camera.name!r}", camera.shape, theirs[camera.name].shape)
    for what, a, b in (("state", one.state, other.state), ("action", one.action, other.action)):
        unlike(f"{what} shape", a.shape, b.shape)
        if a.labels and b.labels:
            unlike(f"{what} labels", a.labels, b.labels)
        if a.unit and b.unit:
            unlike(f"{what} unit", a.unit, b.unit)
    if one.control and other.control:
        unlike("control mode", one.control, other.control)
    if one.hz and other.hz:
        unlike("rate in Hz", float(one.hz), float(other.hz))
    return found


def require_same(one: Embodiment, one_is: str, other: Embodiment, other_is: str) -> None:
    """Raise EmbodimentError naming both sides and every difference, unless there is none."""
    found = differences(one, other)
    if found:
        listed = "\n  ".join(found)
        raise EmbodimentError(
            f"{one_is} (here: embodiment {one.name!r}) does not fit {other_is} "
            f"(there: {other.name!r}):\n  {listed}\n"
            "Declare the same robot on both sides, or choose data, checkpoint and protocol that fit."
        )


def renderer_notice(one_is: str, one: Embodiment, other_is: str, other: Embodiment) -> str:
    """Return a sentence for readers where two embodiments' pixels come from different renderers, else "".

    That is no error (a policy may well survive it), but nobody may believe a number without knowing it.
    """
    if not one.renderer or not other.renderer or one.renderer == other.renderer:
        return ""
    return (
        f"RENDERER: {one_is} pictures made by {one.renderer!r}, {other_is} pictures made by "
        f"{other.renderer!r}; the difference may cost the policy successes."
    )


@dataclass(frozen=True)
class Observation:
    """What the robot sees at one moment.

    `images` maps a camera's name to uint8 [h, w, 3] RGB; a camera that is missing at this moment is absent.
    `state` is float32 [s]. `privileged` holds simulator state for scripted experts; the codec never reads it.
    `past` holds earlier observations of the same episode, oldest first, for policies with a history; it is
    shorter at the episode's start, and theirs is empty.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str
    privileged: Mapping[str, NDArray] = field(default_factory=lambda: NOTHING)
    past: tuple["Observation", ...] = ()


@dataclass(frozen=True)
class ActionChunk:
    """The actions of the next t control steps, float32 [t, a], in the robot's units."""

    actions: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """An observation and the chunk that followed it.

    `actions` is float32 [t, a]; `is_real` is bool [t]: steps past the episode's end repeat the last action
    and are False. `key` identifies the sample in its dataset: (dataset, episode, step).
    """

    observation: Observation
    actions: NDArray[np.float32]
    is_real: NDArray[np.bool_]
    key: tuple[str, str, int]


@dataclass(frozen=True)
class EpisodeKey:
    """What names one call of a policy in a rollout; its noise is drawn from exactly this."""

    seed: int
    task: str
    replan: int


@runtime_checkable
class Actor(Protocol):
    """Anything that acts: a local or remote policy, a scripted expert, a replayed recording."""

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one chunk for each observation, in order."""
        ...


@runtime_checkable
class Env(Protocol):
    """One simulated robot; one instance plays one episode at a time."""

    embodiment: Embodiment
    versions: Mapping[str, str]  # of the simulator and what decides its results
    tasks: tuple[str, ...]

    def instruction(self, task: str) -> str:
        """Return the sentence that asks for `task`."""
        ...

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode. The same task and seed always give the same start."""
        ...

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [a]; return the observation, success so far, and whether the episode is cut off.

        With `render=False` the observation's images are left out: the steps inside a chunk need none.
        """
        ...

    def close(self) -> None: ...
