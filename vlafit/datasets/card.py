"""A data card: a TOML file that says everything about a recorded dataset that its files do not.

Where the files are, what robot they show (compared with what they hold, never reshaped to fit), where the
instruction comes from, how many episodes there should be; and, for data that this package records itself,
how to record it. What depends on the arrangement of the files is the layout's, in a table of its own.
"""

import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError, command_line, did_you_mean
from vlafit.files import expand_user, irregular, require_regular_files
from vlafit.types import Angles, ColumnForm, Embodiment, Feature, Gripper, Pose

T = TypeVar("T")


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

    channels: Literal["", "rgb", "bgr"] = ""
    """"bgr": red and blue of the frames, or of encoded frames as any viewer shows them, are exchanged. Empty
    means "rgb", but must be filled in for encoded frames (JPEG in HDF5), whose files do not tell."""

    def upright(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return `frames` [..., h, w, 3] in RGB, rotated and flipped as the card says, read-only.

        The frames themselves if there is nothing to do, else a copy (by channel, seven times as fast as a
        copy of reversed columns).
        """
        turned, swapped = self.rotate == 180, self.channels == "bgr"
        view = frames
        if turned != (self.flip == "vertical"):
            view = view[..., ::-1, :, :]
        if turned != (self.flip == "horizontal"):
            view = view[..., ::-1, :]
        if view is frames and not swapped:
            return frames
        made = np.empty(view.shape, np.uint8)
        for channel in range(3):
            made[..., channel] = view[..., 2 - channel if swapped else channel]
        made.flags.writeable = False
        return made


@dataclass(frozen=True)
class ColumnCard:
    """A state or action column: floats [T, dimensions]."""

    keys: tuple[str, ...]
    """Where the layout finds the parts of the column (see a camera's key), concatenated in this order. A part
    [T] is one dimension; "KEY[:, 2]" and "KEY[:, :6]" take some dimensions of a part."""
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
    scale: tuple[float, ...] = ()
    """Factor of each dimension of the files; negative turns its sign. Required for columns of
    whole numbers or true/false, which have no unit of their own. Empty: 1."""
    offset: tuple[float, ...] = ()
    """Offset added to each dimension, after `scale`. Empty: 0."""
    poses: tuple[Pose, ...] = ()
    """Poses of end effectors: where they are, and the form in which their rotations are learned."""
    grippers: tuple[Gripper, ...] = ()
    """Of actions: dimensions that only open and close a gripper, learned as 0 and 1."""
    angles: tuple[Angles, ...] = ()
    """Of states: angles in radians, learned as sines and cosines."""

    @property
    def form(self) -> ColumnForm:
        """What a policy learns of the column, where that is not the column itself."""
        return ColumnForm(self.poses, self.grippers, self.angles)


@dataclass(frozen=True)
class RobotCard:
    """The embodiment that the files show."""

    name: str
    """Name of the embodiment; statistics are stored under it."""
    hz: float
    """Control rate."""
    control: str
    """Meaning of an action, for example delta_position."""
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
    """Source of the pixels: camera, ray, egl or osmesa; empty if unknown."""


@dataclass(frozen=True)
class InstructionCard:
    """Where the sentence of an episode comes from."""

    source: str = ""
    """card: from `text` and `files` below; or a source of the layout (libero: attrs, filename). The HDF5
    layouts also have demo (`key` in the demonstration) and beside (`key` in the JSON file `file`). Empty: the
    layout's own."""
    text: str = ""
    """With source "card": the sentence for every file that `files` does not name."""
    files: dict[str, str] = field(default_factory=dict)
    """With source "card": the sentence of a file, by its name without suffix, or by its folder's name."""
    key: str = ""
    """With source "demo" or "beside": an attribute or dataset, or a path in JSON ("ep_meta.lang")."""
    file: str = ""
    """With source "beside": a JSON file from each data file's folder on; {stem} is the data file's name
    without suffix, for example "../instructions/{stem}.json"."""

    def sentence(self, stem: str, where: str, folder: str = "") -> str:
        """Return the card's sentence for the file `stem` in `folder`. Raises DataError if it has none."""
        text = self.files.get(stem, self.files.get(folder, self.text))
        if not text.strip():
            near = did_you_mean(stem, self.files)
            raise DataError(f"{where}: the card has no sentence for {stem!r} (instruction.files){near}")
        return text


@dataclass(frozen=True)
class RowsCard:
    """How the rows of the files become steps."""

    observations: Literal["", "T", "T+1"] = ""
    """"T": as many rows as actions. "T+1": one more, after the last action, which is not used. Empty: the
    layout's own."""
    action_shift: int = 0
    """The action of step t is in row t + action_shift. With 1 the last step is dropped: if the action's keys
    name the state, the action is the next state. With -1, for recorders that write an action one row late,
    the first action is repeated."""


@dataclass(frozen=True)
class EpisodesCard:
    """Which episodes to use."""

    skip: tuple[str, ...] = ()
    """Episodes to leave out: ids, or patterns with * and ?. Their files are not looked into."""
    success: str = ""
    """Use only episodes in which this is true at some step: an attribute or dataset of the demonstration, or
    a LeRobot feature."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Treatment of an episode that cannot be read as the card says: stop with an error, or leave it out
    with a warning and a record in the run's folder."""


@dataclass(frozen=True)
class ExpectCard:
    """Expected counts; 0 leaves a number unchecked."""

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
    keep: dict[str, str] = field(default_factory=dict)
    """Dataset of a demonstration -> the value of the simulator (`Observation.privileged`) to keep in it."""


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
    rows: RowsCard = field(default_factory=RowsCard)
    """How rows become steps."""
    episodes: EpisodesCard = field(default_factory=EpisodesCard)
    """Which episodes to use."""
    expect: ExpectCard = field(default_factory=ExpectCard)
    """Expected counts. Without a number of episodes, a recorded dataset expects what [record] asks for."""
    record: RecordSpec | None = None
    """How to record it."""
    purpose: str = ""
    """Purpose of the dataset."""
    license: str = ""
    """Its license."""
    source: str = ""
    """Where it comes from, and how to get it."""
    quirks: tuple[str, ...] = ()
    """Notes for users of the files."""
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
        whole = expand_user(self.path)
        fixed = Path(*_before_wildcards(whole))
        if whole.is_absolute():
            return fixed
        below = Path("data") / fixed
        beside = self.file.parent / fixed if self.file else below
        return beside if beside.exists() else below

    def linked_folders(self, names: Sequence[str]) -> list[Path]:
        """Return the folders that its files may link to; names are relative to the card's folder.

        Raises DataError for one that does not exist, or that holds the whole file system.
        """
        beside = self.file.parent if self.file else Path()
        folders = [(beside / expand_user(name)).resolve() for name in names]
        for name, folder in zip(names, folders, strict=True):
            if not folder.is_dir() or folder == Path(folder.anchor):
                problem = "holds every file of this machine" if folder.is_dir() else "is no folder"
                raise DataError(
                    f"{self.file or self.name}: linked names {name!r} ({folder}), which {problem}; name the "
                    "folder that the dataset's files link to, from the card's own folder on"
                )
        return folders

    def files(self, suffixes: Collection[str] = ()) -> list[Path]:
        """Return the dataset's files, sorted: what `path` matches, or a folder's files with these suffixes.

        Without suffixes, all files of the folder count. Hidden files never do. Raises DataError saying where
        it looked if there is none.
        """
        root = self.location()
        parts = expand_user(self.path).parts[len(_before_wildcards(expand_user(self.path))) :]
        if parts:
            paths = [Path(p) for p in glob.glob(str(root.joinpath(*parts)), recursive=True)]
        elif root.is_dir():
            paths = [p for p in root.iterdir() if not suffixes or p.suffix in suffixes]
            paths = [p for p in paths if not p.name.startswith(".")]
        else:
            paths = [root]
        for path in sorted(paths):
            kind = "" if path.is_dir() and path.suffix not in suffixes else irregular(path)
            if kind:
                raise DataError(f"dataset {self.name!r}: {path}: not a regular file but {kind}")
        paths = sorted(p for p in paths if p.is_file())
        for folder in {path.parent for path in paths}:
            require_regular_files(folder, (".json",))  # what lies beside a file, which may be absent
        if not paths:
            raise DataError(f"dataset {self.name!r}: {self._no_files(root, suffixes)}")
        return paths

    def _no_files(self, root: Path, suffixes: Collection[str]) -> str:
        beside = f"{self.file.parent} and " if self.file and not Path(self.path).is_absolute() else ""
        where = f"{self.path!r} (looked in {beside}{Path('data').resolve()})" if beside else f"{self.path!r}"
        if self.record is not None:
            card = self.file or self.name
            return f"no recordings at {where}; record them with: {command_line('record', card)}"
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
    missing: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> what the files do not tell. The card is invalid until it is filled in."""


def _feature(name: str, column: ColumnCard) -> Feature:
    return Feature(name, (column.dimensions,), column.unit, column.labels, column.low, column.high)


def _before_wildcards(path: Path) -> tuple[str, ...]:
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return tuple(fixed)
