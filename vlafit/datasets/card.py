"""A data card: a TOML file that says everything about a recorded dataset that its files do not.

Where the files are, what robot they show (compared with what they hold, never reshaped to fit), where the
instruction comes from, how many episodes there should be; and, for data that this package records itself,
how to record it.
"""

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vlafit import config, shipped
from vlafit.errors import ConfigError, DataError
from vlafit.types import Embodiment, Feature

Layout = Literal["libero", "robomimic"]
SUFFIXES = (".hdf5", ".h5")


@dataclass(frozen=True)
class CameraCard:
    """A camera: uint8 RGB frames [T, height, width, 3]."""

    name: str
    """The camera's name from here on; recipes and checkpoints use it."""
    key: str
    """Its dataset below a demonstration, for example obs/agentview_rgb."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    rotate: Literal[0, 180] = 0
    """Degrees by which frames are turned when read, where the file has them upside-down."""


@dataclass(frozen=True)
class ColumnCard:
    """A state or action column: floats [T, dimensions]."""

    keys: tuple[str, ...]
    """Datasets below a demonstration, concatenated in this order."""
    dimensions: int
    """Dimensions after concatenation."""
    labels: tuple[str, ...] = ()
    """A name for each dimension."""
    unit: str = ""
    """Unit, where all dimensions share one."""


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
    """The cameras to use; others in the files are left alone."""
    state: ColumnCard
    """The robot's state."""
    action: ColumnCard
    """The actions."""
    relative: tuple[bool, ...] = ()
    """For each action dimension: whether to learn it minus the same dimension of the state at the chunk's
    start, as suits absolute targets in the state's own units. Empty: none."""
    renderer: str = ""
    """What made the pixels: camera, ray, egl or osmesa; empty where unknown."""


@dataclass(frozen=True)
class InstructionCard:
    """Where the sentence of an episode comes from."""

    source: Literal["attrs", "filename", "card"]
    """attrs: problem_info of /data, as LIBERO; filename: words of the file's name; card: below."""
    text: str = ""
    """With source "card": the sentence for every file that `files` does not name."""
    files: dict[str, str] = field(default_factory=dict)
    """With source "card": the sentence of a file, by its name without suffix."""


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
    layout: Layout
    """How its files are laid out."""
    path: str
    """A file, a folder of HDF5 files or a glob pattern: beside the card, else below ./data/."""
    robot: RobotCard
    """The embodiment."""
    instruction: InstructionCard
    """Where the sentences come from."""
    mask: str = ""
    """With layout robomimic: the filter key (/mask/<key>) whose demonstrations to use. Empty: all."""
    expect: ExpectCard = field(default_factory=ExpectCard)
    """What must be there. Without a number of episodes, a recorded dataset expects what `record` asks for."""
    record: RecordSpec | None = None
    """How to record it."""
    purpose: str = ""
    """What it is for."""
    license: str = ""
    """Its license."""
    source: str = ""
    """Where it comes from, and how to get it."""
    quirks: tuple[str, ...] = ()
    """What a reader of the files should know."""
    file: Path | None = None
    """The card's own file; filled in when it is read."""

    @property
    def embodiment(self) -> Embodiment:
        """The embodiment that the card declares."""
        robot = self.robot
        return Embodiment(
            name=robot.name,
            cameras=tuple(Feature(c.name, (c.height, c.width, 3)) for c in robot.cameras),
            state=Feature("state", (robot.state.dimensions,), robot.state.unit, robot.state.labels),
            action=Feature("action", (robot.action.dimensions,), robot.action.unit, robot.action.labels),
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

    def files(self) -> list[Path]:
        """Return the dataset's files, sorted. Raises DataError saying where it looked if there is none."""
        root = self.location()
        parts = Path(self.path).expanduser().parts[len(_before_wildcards(Path(self.path).expanduser())) :]
        if parts:
            found = [Path(p) for p in glob.glob(str(root.joinpath(*parts)), recursive=True)]
        elif root.is_dir():
            found = [p for p in root.iterdir() if p.suffix in SUFFIXES]
        else:
            found = [root]
        found = sorted(p for p in found if p.is_file())
        if not found:
            raise DataError(f"dataset {self.name!r}: {self._nothing_found(root)}")
        return found

    def _nothing_found(self, root: Path) -> str:
        beside = f"{self.file.parent} and " if self.file and not Path(self.path).is_absolute() else ""
        where = f"{self.path!r} (looked in {beside}{Path('data').resolve()})" if beside else f"{self.path!r}"
        if self.record is not None:
            card = self.file or self.name
            return f"no recordings at {where}; record them with: vlafit record {card}"
        what = f"{root} holds no {' or '.join(SUFFIXES)} file" if root.is_dir() else f"nothing is at {where}"
        hint = f"; {self.source}" if self.source else "; put the files there, or mend `path` in the card"
        return what + hint


def _before_wildcards(path: Path) -> tuple[str, ...]:
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return tuple(fixed)


def load_card(name_or_path: str | Path) -> Card:
    """Read a card: a path, or the name of one that ships. Raises ConfigError saying what is wrong in it."""
    path = shipped.find("card", str(name_or_path))
    values = config.load_toml(path, "card")
    if "file" in values:
        raise ConfigError(f"{path}: `file` is filled in when the card is read; leave it out")
    card = replace(config.build(Card, values, str(path)), file=path)
    _check(card, str(path))
    return card


def _check(card: Card, where: str) -> None:
    robot = card.robot
    if not robot.cameras:
        raise ConfigError(f"{where}: robot.cameras is empty; a policy needs at least one camera")
    names = [camera.name for camera in robot.cameras]
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{where}: cameras need names of their own, got {names}")
    for camera in robot.cameras:
        if camera.height < 1 or camera.width < 1:
            raise ConfigError(f"{where}: camera {camera.name!r} is {camera.height}x{camera.width} pixels")
    if not robot.hz > 0:
        raise ConfigError(f"{where}: robot.hz must be above 0, is {robot.hz}")
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
        raise ConfigError(f'{where}: instruction.source is "card": give instruction.text or .files')
    if instruction.source != "card" and (instruction.text or instruction.files):
        raise ConfigError(f'{where}: instruction.text and .files need instruction.source = "card"')
    if instruction.source == "attrs" and card.layout == "robomimic":
        raise ConfigError(f'{where}: robomimic files hold no instruction; use instruction.source = "card"')
    if card.mask and card.layout != "robomimic":
        raise ConfigError(f"{where}: only layout robomimic has filter keys (mask = {card.mask!r})")
    record = card.record
    if record is not None:
        if not record.tasks or record.episodes_per_task < 1 or len(set(record.tasks)) != len(record.tasks):
            raise ConfigError(f"{where}: record needs tasks, each once, and at least one episode of each")
        if not 0 <= record.perturbed <= 1 or record.noise < 0 or record.horizon < 1 or record.hold_steps < 0:
            raise ConfigError(
                f"{where}: record: 0 <= perturbed <= 1, noise >= 0, horizon >= 1, hold_steps >= 0"
            )
