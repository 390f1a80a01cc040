"""A data card: a TOML file that says everything about a recorded dataset that its files do not.

Where the files are, what robot they show (compared with what they hold, never reshaped to fit), where the
instruction comes from, how many episodes there should be; and, for data that this package records itself,
how to record it. What depends on the arrangement of the files is the layout's, in a table of its own.
"""

import glob
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import ConfigError, DataError, did_you_mean
from vlafit.types import Embodiment, Feature

T = TypeVar("T")

FASTEST_HZ = 10_000.0  # control rates above are units mixed up


@dataclass(frozen=True)
class CameraCard:
    """A camera: uint8 RGB frames [T, height, width, 3]."""

    name: str
    """The camera's name from here on; recipes and checkpoints use it."""
    key: str
    """Where the layout finds its frames: in HDF5 a dataset below a demonstration, for example
    obs/agentview_rgb; in LeRobot a feature, for example observation.images.front."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    rotate: Literal[0, 180] = 0
    """Degrees by which frames are turned when read, if the file has them upside-down."""
    flip: Literal["", "vertical", "horizontal"] = ""
    """Mirror frames when read: "vertical" swaps top and bottom, "horizontal" left and right."""

    def upright(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return `frames` [..., h, w, 3] rotated and flipped as the card says; a view, not a copy."""
        turned = self.rotate == 180
        if turned != (self.flip == "vertical"):
            frames = frames[..., ::-1, :, :]
        if turned != (self.flip == "horizontal"):
            frames = frames[..., ::-1, :]
        return frames


@dataclass(frozen=True)
class ColumnCard:
    """A state or action column: floats [T, dimensions]."""

    keys: tuple[str, ...]
    """Where the layout finds the parts of the column (see a camera's key), concatenated in this order."""
    dimensions: int
    """Dimensions after concatenation."""
    labels: tuple[str, ...] = ()
    """A name for each dimension."""
    unit: str = ""
    """Unit, if all dimensions share one."""
    low: tuple[float, ...] = ()
    """The least value of each dimension that the robot permits; empty: no limit."""
    high: tuple[float, ...] = ()
    """The greatest value of each dimension that the robot permits; empty: no limit."""


@dataclass(frozen=True)
class RobotCard:
    """The embodiment that the files show."""

    name: str
    """Name of the embodiment; statistics are stored under it."""
    hz: float
    """Control rate."""
    control: str
    """What an action means, for example delta_position."""
    cameras: tuple[CameraCard, ...]
    """The cameras to use; others in the files are not read."""
    state: ColumnCard
    """The robot's state."""
    action: ColumnCard
    """The actions."""
    relative: tuple[bool, ...] = ()
    """For each action dimension: whether to learn it minus the same dimension of the state at the chunk's
    start, as suits absolute targets in the state's own units. Empty: none."""
    renderer: str = ""
    """What made the pixels: camera, ray, egl or osmesa; empty if unknown."""


def with_relative_matches(card: "Card") -> "Card":
    """Return the card with every action relative that has the name of its state dimension.

    Without names, as many dimensions as the state match in order. Raises ConfigError if none matches.
    """
    state, action = card.robot.state, card.robot.action
    if not state.labels and not action.labels:
        mask = (state.dimensions == action.dimensions,) * action.dimensions
    else:
        names = [*state.labels, *[""] * action.dimensions]
        mask = tuple(bool(label) and label == names[d] for d, label in enumerate(action.labels))
    if not any(mask):
        raise ConfigError(
            f'data.relative = "matching": no action of card {card.name!r} has the name of its state '
            f"dimension (state: {', '.join(state.labels) or 'no names'}; action: "
            f"{', '.join(action.labels) or 'no names'}); "
            'set robot.relative in a card, or data.relative = "card"'
        )
    return replace(card, robot=replace(card.robot, relative=mask))


@dataclass(frozen=True)
class InstructionCard:
    """Where the sentence of an episode comes from."""

    source: str = ""
    """card: from `text` and `files` below; or a source of the layout (libero: attrs, filename). Empty: the
    layout's own."""
    text: str = ""
    """With source "card": the sentence for every file that `files` does not name."""
    files: dict[str, str] = field(default_factory=dict)
    """With source "card": the sentence of a file, by its name without suffix."""

    def sentence(self, stem: str, where: str) -> str:
        """Return the card's sentence for the file named `stem`. Raises DataError if there is none."""
        text = self.files.get(stem, self.text)
        if not text.strip():
            near = did_you_mean(stem, self.files)
            raise DataError(f"{where}: the card has no sentence for {stem!r} (instruction.files){near}")
        return text


@dataclass(frozen=True)
class ExpectCard:
    """What must be there; 0 leaves a number unchecked."""

    episodes: int = 0
    """Episodes in all files."""
    frames: int = 0
    """Frames in all episodes."""


@dataclass(frozen=True)
class RecordSpec:
    """How to record the dataset with a scripted expert; cameras, size and renderer are the robot's."""

    env: str
    """Environment: a module of vlafit.envs."""
    tasks: tuple[str, ...]
    """Tasks of the environment, one file each."""
    episodes_per_task: int
    """Successful episodes of each task."""
    first_seed: int = 1000
    """Episodes start from this seed on; evaluation must use others."""
    perturbed: float = 0.0
    """Share of the episodes in which the executed actions are disturbed; the labels stay the expert's."""
    noise: float = 0.3
    """Standard deviation of the disturbance, in units of the action."""
    horizon: int = 200
    """Steps after which an episode without success is given up."""
    hold_steps: int = 8
    """Steps recorded after success."""
    compress: bool = False
    """Compress the frames: a tenth of the size, slower to read. False: contiguous, read by memory map."""


@dataclass(frozen=True)
class Card:
    """A dataset."""

    name: str
    """Name of the dataset; part of every sample's key."""
    layout: str
    """How its files are arranged: a module of vlafit.datasets.layouts, an installed layout's name, or the
    dotted path of a module elsewhere. The layout's own options are in a table of its name."""
    path: str
    """A file, a folder or a glob pattern: beside the card, else below ./data/."""
    robot: RobotCard
    """The embodiment."""
    instruction: InstructionCard = field(default_factory=InstructionCard)
    """Where the sentences come from."""
    section: object = None
    """The layout's own options; filled in when the card is read."""
    expect: ExpectCard = field(default_factory=ExpectCard)
    """What must be there. Without a number of episodes, a recorded dataset expects what [record] asks for."""
    record: RecordSpec | None = None
    """How to record it."""
    purpose: str = ""
    """What it is for."""
    license: str = ""
    """Its license."""
    source: str = ""
    """Where it comes from, and how to get it."""
    quirks: tuple[str, ...] = ()
    """What a user of the files should know."""
    file: Path | None = None
    """The card's own file; filled in when it is read."""

    @property
    def embodiment(self) -> Embodiment:
        """The embodiment that the card declares."""
        robot = self.robot
        return Embodiment(
            name=robot.name,
            cameras=tuple(Feature(c.name, (c.height, c.width, 3)) for c in robot.cameras),
            state=_feature("state", robot.state),
            action=_feature("action", robot.action),
            hz=robot.hz,
            control=robot.control,
            renderer=robot.renderer,
        )

    @property
    def expected_episodes(self) -> int:
        """Episodes that must be there; 0: any number."""
        if self.expect.episodes or self.record is None:
            return self.expect.episodes
        return len(self.record.tasks) * self.record.episodes_per_task

    def options(self, section: type[T]) -> T:
        """Return the layout's own options, `section()` if the card has none."""
        if self.section is None:
            return section()
        if not isinstance(self.section, section):
            raise TypeError(f"layout {self.layout!r} takes {section}, the card has {type(self.section)}")
        return self.section

    def location(self) -> Path:
        """Return where the data is, or is to be recorded: beside the card if it exists, else in ./data/.

        For a glob pattern this is the folder part before the first wildcard.
        """
        whole = Path(self.path).expanduser()
        fixed = Path(*_before_wildcards(whole))
        if whole.is_absolute():
            return fixed
        below = Path("data") / fixed
        beside = self.file.parent / fixed if self.file else below
        return beside if beside.exists() else below

    def files(self, suffixes: Collection[str] = ()) -> list[Path]:
        """Return the dataset's files, sorted: what `path` matches, or a folder's files with these suffixes.

        Without suffixes, all files of the folder count. Hidden files never do. Raises DataError saying where
        it looked if there is none.
        """
        root = self.location()
        parts = Path(self.path).expanduser().parts[len(_before_wildcards(Path(self.path).expanduser())) :]
        if parts:
            paths = [Path(p) for p in glob.glob(str(root.joinpath(*parts)), recursive=True)]
        elif root.is_dir():
            paths = [p for p in root.iterdir() if not suffixes or p.suffix in suffixes]
            paths = [p for p in paths if not p.name.startswith(".")]
        else:
            paths = [root]
        paths = sorted(p for p in paths if p.is_file())
        if not paths:
            raise DataError(f"dataset {self.name!r}: {self._no_files(root, suffixes)}")
        return paths

    def _no_files(self, root: Path, suffixes: Collection[str]) -> str:
        beside = f"{self.file.parent} and " if self.file and not Path(self.path).is_absolute() else ""
        where = f"{self.path!r} (looked in {beside}{Path('data').resolve()})" if beside else f"{self.path!r}"
        if self.record is not None:
            card = self.file or self.name
            return f"no recordings at {where}; record them with: vlafit record {card}"
        what = f"nothing is at {where}"
        if root.is_dir():
            what = f"{root} holds no {' or '.join(suffixes) or 'matching'} file"
        hint = f"; {self.source}" if self.source else "; put the files there, or fix `path` in the card"
        return what + hint


@dataclass(frozen=True)
class Draft:
    """A card that a layout drafted from files, and what it had to guess."""

    card: Card
    guesses: Mapping[str, str] = field(default_factory=dict)
    """Dotted key of the card -> why its value is a guess, and what to check."""


def _feature(name: str, column: ColumnCard) -> Feature:
    return Feature(name, (column.dimensions,), column.unit, column.labels, column.low, column.high)


def _before_wildcards(path: Path) -> tuple[str, ...]:
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return tuple(fixed)


def check(card: Card, where: str) -> None:
    """Raise ConfigError, beginning with `where`, if a value of the card is invalid in every layout."""
    robot = card.robot
    if not robot.cameras:
        raise ConfigError(f"{where}: robot.cameras is empty; a policy needs at least one camera")
    names = [camera.name for camera in robot.cameras]
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{where}: cameras need names of their own, got {names}")
    for camera in robot.cameras:
        if camera.height < 1 or camera.width < 1:
            raise ConfigError(f"{where}: camera {camera.name!r} is {camera.height}x{camera.width} pixels")
        if not camera.name.isprintable():
            raise ConfigError(
                f"{where}: camera {camera.name!r}: a name is one line without control characters"
            )
    if not 0 < robot.hz <= FASTEST_HZ:
        raise ConfigError(f"{where}: robot.hz must be above 0 and at most {FASTEST_HZ}, is {robot.hz}")
    columns: Mapping[str, ColumnCard] = {"state": robot.state, "action": robot.action}
    for name, column in columns.items():
        if not column.keys or column.dimensions < 1:
            raise ConfigError(f"{where}: robot.{name} needs at least one key and one dimension")
        if column.labels and len(column.labels) != column.dimensions:
            raise ConfigError(
                f"{where}: robot.{name} has {len(column.labels)} labels for {column.dimensions} dimensions"
            )
    if robot.relative and len(robot.relative) != robot.action.dimensions:
        raise ConfigError(
            f"{where}: robot.relative has {len(robot.relative)} entries for "
            f"{robot.action.dimensions} action dimensions"
        )
    beyond = [d for d, on in enumerate(robot.relative) if on and d >= robot.state.dimensions]
    if beyond:
        raise ConfigError(f"{where}: robot.relative: there is no state for action dimensions {beyond}")
    instruction = card.instruction
    if instruction.source == "card" and not instruction.text.strip() and not instruction.files:
        raise ConfigError(f'{where}: instruction.source is "card": set instruction.text or .files')
    if instruction.source != "card" and (instruction.text or instruction.files):
        raise ConfigError(f'{where}: instruction.text and .files need instruction.source = "card"')
    record = card.record
    if record is not None:
        if not record.tasks or record.episodes_per_task < 1 or len(set(record.tasks)) != len(record.tasks):
            raise ConfigError(f"{where}: record needs tasks, each once, and at least one episode of each")
        if not 0 <= record.perturbed <= 1 or record.noise < 0 or record.horizon < 1 or record.hold_steps < 0:
            raise ConfigError(
                f"{where}: record: 0 <= perturbed <= 1, noise >= 0, horizon >= 1, hold_steps >= 0"
            )
