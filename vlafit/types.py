"""Types on the robot's side: numpy arrays in physical units, no batch axis, the instruction as text.

Nothing here imports torch. The model's counterpart, `Batch`, is in `vlafit.nn.batch`; only `vlafit.codec`
converts between the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import EmbodimentError, contrasted, quoted

NOTHING: Mapping[str, NDArray] = MappingProxyType({})  # an empty, read-only mapping


UNITS: Mapping[str, tuple[str, ...]] = {
    "m": ("metre", "metres", "meter", "meters"),
    "cm": ("centimetre", "centimetres", "centimeter", "centimeters"),
    "mm": ("millimetre", "millimetres", "millimeter", "millimeters"),
    "rad": ("radian", "radians"),
    "deg": ("degree", "degrees", "°"),
}
"""Symbols of units and their names."""


@dataclass(frozen=True)
class Feature:
    """A named column, or a camera.

    A camera's shape is (height, width, 3) and its pixels are uint8 RGB; a column's shape is (dimensions,).
    `labels`, when given, names each dimension of a column. `low` and `high`, when given, are the least and
    the greatest value of each dimension that the robot permits.
    """

    name: str
    shape: tuple[int, ...]
    unit: str = ""
    labels: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


RotationForm = Literal[
    "axis_angle", "euler_xyz", "quaternion_xyzw", "quaternion_wxyz", "matrix", "rot6d_rows", "rot6d_columns"
]
"""How a rotation is written, as the matrix R that turns vectors of the hand's frame into the base's.

axis_angle: the axis times the angle in radians. euler_xyz: roll, pitch and yaw in radians about the base's
fixed axes, R = Rz(yaw) Ry(pitch) Rx(roll). matrix: R row by row. rot6d_rows: the first two rows of R, as
GR00T has them. rot6d_columns: its first two columns, one after the other, as X-VLA has them.
"""

ROTATION_WIDTH: Mapping[RotationForm, int] = {
    "axis_angle": 3,
    "euler_xyz": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "matrix": 9,
    "rot6d_rows": 6,
    "rot6d_columns": 6,
}
"""Dimensions of each form."""


@dataclass(frozen=True)
class Pose:
    """Where a column has the pose of an end effector, and what a policy learns of it."""

    position: int
    """First of its three dimensions of position, counted from 0."""
    rotation: int
    """First dimension of its rotation."""
    form: RotationForm
    """How the column writes the rotation."""
    learned: RotationForm | None = None
    """How the policy learns the rotation; None: as the column writes it."""
    relative: bool = False
    """Of an action: whether it is learned in the frame of the state's pose at the chunk's start."""
    reference: int = 0
    """Of a relative action: which pose of the state that is, counted from 0."""

    @property
    def policy_form(self) -> RotationForm:
        """How the policy learns the rotation."""
        return self.learned or self.form


@dataclass(frozen=True)
class Gripper:
    """A dimension of an action that only opens and closes a gripper, learned as 0 or 1."""

    dimension: int
    """Counted from 0."""
    zero: float
    """The robot's value that is learned as 0, and sent for an answer up to 0.5."""
    one: float
    """The robot's value that is learned as 1, and sent for an answer above 0.5."""


@dataclass(frozen=True)
class Angles:
    """Dimensions of a state that are angles in radians, learned as all their sines, then their cosines."""

    first: int
    """Counted from 0."""
    count: int


@dataclass(frozen=True)
class ColumnForm:
    """What a policy learns of a column, where that is not the column itself."""

    poses: tuple[Pose, ...] = ()
    grippers: tuple[Gripper, ...] = ()
    angles: tuple[Angles, ...] = ()

    @property
    def dimensions(self) -> frozenset[int]:
        """The column's dimensions that belong to a pose, a gripper or angles."""
        spans = [
            *((pose.position, 3) for pose in self.poses),
            *((pose.rotation, ROTATION_WIDTH[pose.form]) for pose in self.poses),
            *((gripper.dimension, 1) for gripper in self.grippers),
            *((angles.first, angles.count) for angles in self.angles),
        ]
        return frozenset(dimension for first, count in spans for dimension in range(first, first + count))

    @property
    def is_plain(self) -> bool:
        """Whether the policy learns the column as it is."""
        same = all(not pose.relative and pose.policy_form == pose.form for pose in self.poses)
        return same and not self.grippers and not self.angles


@dataclass(frozen=True)
class Embodiment:
    """The robot as declared by a dataset, an environment or a checkpoint.

    `control` is the meaning of an action (for example ``"delta_position"``), `hz` the control rate. `control`
    is empty and `hz` is 0 if a checkpoint's files do not record them.
    `renderer` is the source of the pixels: ``"camera"`` for a real robot, ``"ray"`` or (with the version of
    a renderer whose pictures have changed) ``"egl-2"`` for simulations, empty if unknown.
    """

    name: str
    cameras: tuple[Feature, ...]
    state: Feature
    action: Feature
    hz: float
    control: str
    renderer: str = ""

    def camera(self, name: str) -> Feature:
        """Return the camera called `name`, or raise EmbodimentError listing the cameras."""
        for camera in self.cameras:
            if camera.name == name:
                return camera
        listed = ", ".join(c.name for c in self.cameras)
        raise EmbodimentError(f"embodiment {self.name!r} has no camera {quoted(name)}; it has: {listed}")


def plain_unit(unit: str) -> str:
    """Return a unit's symbol for its names: `m` for metre and meters. Others as they are, in lower case."""
    word = unit.strip().lower()
    return next((symbol for symbol, names in UNITS.items() if word in names), word)


def differences(first: Embodiment, second: Embodiment) -> list[str]:
    """Return one line for each field in which two embodiments are incompatible, the renderer excluded.

    Units, labels, control mode and rate are compared only if both sides declare them, names never.
    """
    lines = []

    def compare(name: str, here: object, there: object) -> None:
        if here != there:
            lines.append(f"{name}: {here} here, {there} there")

    compare("cameras", sorted(c.name for c in first.cameras), sorted(c.name for c in second.cameras))
    second_cameras = {c.name: c for c in second.cameras}
    for camera in first.cameras:
        if camera.name in second_cameras:
            compare(f"size of camera {camera.name!r}", camera.shape, second_cameras[camera.name].shape)
    for column, a, b in (("state", first.state, second.state), ("action", first.action, second.action)):
        compare(f"{column} shape", a.shape, b.shape)
        if a.labels and b.labels:
            compare(f"{column} labels", *contrasted(a.labels, b.labels))
        if a.unit and b.unit and plain_unit(a.unit) != plain_unit(b.unit):
            compare(f"{column} unit", a.unit, b.unit)
    if first.control and second.control:
        compare("control mode", first.control, second.control)
    if first.hz and second.hz:
        compare("rate in Hz", float(first.hz), float(second.hz))
    return lines


def require_same(
    first: Embodiment, first_is: str, second: Embodiment, second_is: str, remedy: str = ""
) -> None:
    """Raise EmbodimentError naming both sides and every difference, if there is one, and the `remedy`."""
    lines = differences(first, second)
    if lines:
        listed = "\n  ".join(lines)
        raise EmbodimentError(
            f"{first_is} (here: embodiment {first.name!r}) does not fit {second_is} "
            f"(there: {second.name!r}):\n  {listed}\n{remedy and remedy + chr(10)}"
            "Correct the side that describes its robot wrongly (labels, units, control mode and rate count "
            "only where both state them). If the robots do differ, choose data, checkpoint and protocol of "
            "one, or train on the new robot's data, where [adapt] maps cameras and accepts what is meant."
        )


def renderer_notice(first_is: str, first: Embodiment, second_is: str, second: Embodiment) -> str:
    """Return a warning if the pixels of two embodiments come from different renderers, else "".

    Different renderers are allowed, because a policy may cope with them, but every result must say so.
    """
    if not first.renderer or not second.renderer or first.renderer == second.renderer:
        return ""
    same = first.renderer.partition("-")[0] == second.renderer.partition("-")[0]
    versions = "two versions of one renderer, which light the scene differently; " if same else ""
    return (
        f"RENDERER: {first_is} images rendered by {first.renderer!r}, {second_is} images rendered by "
        f"{second.renderer!r}; {versions}the difference may lower the success rate."
    )


@dataclass(frozen=True)
class Observation:
    """Camera images, state and instruction at one time step.

    `images` maps a camera's name to uint8 [h, w, 3] RGB; a camera without an image at this step is absent.
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
    """Actions for the next t control steps, float32 [t, a], in the robot's units."""

    actions: NDArray[np.float32]
    valid: bool | None = None
    """Of a policy that answers with tokens: whether they made a chunk. If not, `actions` are what is executed
    in its place. None: the policy answers with numbers."""


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
    """Identifies one policy call in a rollout; the call's random noise is seeded from these values only."""

    seed: int
    task: str
    replan: int


@runtime_checkable
class Actor(Protocol):
    """Anything that chooses actions: a local or remote policy, a scripted expert, a replayed recording."""

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one action chunk for each observation, in order."""
        ...


@runtime_checkable
class HistoryActor(Actor, Protocol):
    """An actor that also reads the observations of earlier control steps, in `Observation.past`."""

    history: int
    """Observations that it reads, the newest included; 1: only the newest."""


def history_of(actor: Actor) -> int:
    """Return how many observations an actor reads, the newest included."""
    return actor.history if isinstance(actor, HistoryActor) else 1


@runtime_checkable
class ChunkActor(Actor, Protocol):
    """An actor that says how long its chunks are."""

    chunk: int
    """Control steps of a chunk; 0: not known."""


def chunk_of(actor: Actor) -> int:
    """Return how many control steps an actor's chunks have; 0 where it does not say."""
    return actor.chunk if isinstance(actor, ChunkActor) else 0


Schedule = Literal["exponential", "linear", "ones", "zeros"]
"""How the weights of real-time chunking fall from 1 (committed steps) to 0 (steps that are free)."""
Prefix = Literal["auto", "inpaint", "clean"]
"""How a policy is given the committed steps: as it was trained (auto), guided, or clean."""


@dataclass(frozen=True)
class Guidance:
    """How strongly a new chunk is held to the one that is being executed (real-time chunking).

    Defaults are those of the paper (Black et al. 2025, "Real-Time Execution of Action Chunking Flow
    Policies", table 2 and section 4.3). With `jacobian` the error is propagated back through the network as
    in the paper; without, it is applied to the actions directly, which costs no backward pass (LeRobot 0.6.1
    does so).

    A policy that was trained for it (train.max_delay) is given the committed steps clean instead, which costs
    nothing; `prefix` = "inpaint" guides that one, too, and "clean" refuses every other.
    """

    schedule: Schedule = "exponential"
    max_weight: float = 5.0
    jacobian: bool = True
    prefix: Prefix = "auto"


@dataclass(frozen=True)
class Committed:
    """The rest of the chunk that is being executed, from the step of the observation on.

    `actions` is float32 [k, a] in the robot's units. The first `delay` of them will have been executed before
    the new chunk can begin; those from `end` on are free to change.
    """

    actions: NDArray[np.float32]
    delay: int
    end: int
    guidance: Guidance = Guidance()


@runtime_checkable
class GuidedActor(Actor, Protocol):
    """An actor that can continue the chunk that is being executed: what real-time chunking needs."""

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        """Return one chunk for each observation, in order; `None` asks for a chunk that continues nothing."""
        ...


@runtime_checkable
class Env(Protocol):
    """One simulated robot; an instance runs one episode at a time."""

    embodiment: Embodiment
    versions: Mapping[str, str]  # package -> version, for the simulator and all that decides its results
    tasks: tuple[str, ...]

    def instruction(self, task: str) -> str:
        """Return the instruction for `task`, one sentence."""
        ...

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode. The same task and seed always give the same initial state."""
        ...

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Apply one action [a]; return the observation, success so far, and whether the episode is truncated.

        With `render=False` the observation has no images, because steps within a chunk need none.
        """
        ...

    def close(self) -> None: ...
