"""Messages between an evaluation and its environment processes; `vlafit.envs.wire` writes and reads them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.types import Embodiment, Observation


@dataclass(frozen=True)
class Start:
    """The first command: create an environment and describe it. Answered by Ready, Unplayable or Failed.

    With `start`, a task and a seed, an episode is begun, to see that it can be begun and drawn. An answer to
    another command that takes longer than `timeout_s` is Failed. `seeds` has the first seed of the episodes
    of each task, and their number.
    """

    spec: EnvSpec
    start: tuple[str, int] | None = None
    timeout_s: float = math.inf
    seeds: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reset:
    """Start an episode: reset, settle, `start_steps` random actions, drawn again where they solve the task.

    Answered by Moved or Failed.
    """

    slot: int
    task: str
    seed: int
    settle_steps: int
    settle_action: tuple[float, ...]
    start_steps: int
    render: bool
    film: bool


@dataclass(frozen=True)
class Play:
    """Execute `actions` [k, a] in `slot`, up to the first success. Answered by Moved or Failed.

    The last `history` observations are returned, and rendered if `render`; with `film` every one is, and all
    are sent as frames.
    """

    slot: int
    actions: NDArray[np.float32]
    render: bool
    film: bool
    history: int


@dataclass(frozen=True)
class Ready:
    """The environment's description of itself."""

    embodiment: Embodiment
    versions: Mapping[str, str]
    instructions: Mapping[str, str]  # of each task
    program_bytes: int  # memory of the process before it began an episode
    env_bytes: int  # what the episode's environment added
    shares_process: bool  # whether a process can have several of them
    missing: tuple[str, ...] = ()  # of each task without a start for one of `Start.seeds`, the reason


@dataclass(frozen=True)
class Moved:
    """State of an episode after its last command. `frames` are uint8 [h, w, 3], of the first camera.

    `earlier` are the observations before the last one, oldest first, as many as were asked for.
    """

    slot: int
    observation: Observation
    earlier: tuple[Observation, ...]
    steps: int
    success: bool
    truncated: bool
    frames: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Failed:
    """A command that raised. Its slot's environment is discarded; the process continues."""

    text: str


@dataclass(frozen=True)
class Unplayable:
    """The environment was created, but the episode of Start could not be begun or drawn."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The process on another machine has ended: the last message of its connection, by `vlafit.envs.host`."""

    text: str


@dataclass(frozen=True)
class Hello:
    """The first message of a connection to another machine, by `vlafit.envs.host`."""

    source_sha256: str  # of vlafit's code there
    cores: int
    free_bytes: int


Command = Start | Reset | Play
Reply = Ready | Moved | Failed | Unplayable | Ended
COMMANDS = (Start, Reset, Play)
REPLIES = (Ready, Moved, Failed, Unplayable, Ended)
