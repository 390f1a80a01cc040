"""DROID's raw layout: a folder an episode, with trajectory.h5, metadata_UUID.json and an MP4 of each camera.

`recordings/MP4/SERIAL.mp4` holds a frame for each row. The serial numbers of the cameras differ from robot to
robot, so a camera's key is "wrist", "ext1" or "ext2", whose serial number is in the metadata, or a number.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py

from vlafit.datasets.card import (
    CameraCard,
    Card,
    ColumnCard,
    Draft,
    InstructionCard,
    RobotCard,
)
from vlafit.datasets.filmed import FilmedStore
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.hdf5_demos import Demonstration, Hdf5Layout
from vlafit.datasets.hdf5_files import reading
from vlafit.datasets.naming import name_of
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError, nearest
from vlafit.files import parse_json, plain_text

INSTRUCTIONS = ("current_task", "demo", "beside")
"""current_task: of the metadata beside."""
FILE = "trajectory.h5"
MOVING = "observation/controller_info/movement_enabled"
SERIALS = {"wrist": "wrist_cam_serial", "ext1": "ext1_cam_serial", "ext2": "ext2_cam_serial"}
STATE = ("observation/robot_state/joint_positions", "observation/robot_state/gripper_position")
ACTION = ("action/joint_velocity", "action/gripper_position")  # openpi's choice
MOST_FOLDERS = 1000  # looked into for the first episode
DEEPEST = 6  # LAB/success/DATE/TIME below the folder that is named


@dataclass(frozen=True)
class Section:
    """The table [droid] of a card."""

    idle: Literal["drop", "keep"] = "drop"
    """Rows in which the operator had not enabled movement: their actions were never executed."""
    linked: tuple[str, ...] = ()
    """Folders outside the dataset's own that its files may link to."""


def recognise(path: Path) -> bool:
    """Whether there is a trajectory.h5 with /observation/robot_state and /action at or below `path`."""
    file = _first(path)
    if file is None:
        return False
    with reading(file) as opened:
        return "observation/robot_state" in opened and isinstance(opened.get("action"), h5py.Group)


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    section, robot = card.options(Section), card.robot
    drop = section.idle == "drop"
    columns = replace(
        card,
        path=f"{card.path}/**/{FILE}" if card.location().is_dir() and "*" not in card.path else card.path,
        robot=replace(robot, cameras=(), state=_with_flag(robot.state) if drop else robot.state),
    )
    store = Hdf5Store(columns, Hdf5Layout(_list, _tell, linked=section.linked))
    own = [path.parent for path in store.files() if path.name == FILE]
    folders = {_id_of(folder): folder for folder in own if len(_metadata_files(folder)) == 1}
    try:
        return FilmedStore(card, store, lambda info, key: _video(folders[info.id], key), flag=drop)
    except BaseException:
        store.close()
        raise


def describe(path: Path) -> Draft:
    """Draft the card of the episodes at or below `path`."""
    file = _first(path)
    assert file is not None
    guesses = {
        "robot.name": "name of the robot; statistics are kept under it",
        "robot.hz": "DROID's rate; the files do not tell it",
        "robot.control": "that of the action's keys",
        "robot.state.keys": "a choice; cartesian_position is there, too",
        "robot.action.keys": "openpi's choice; there are also joint_position and cartesian_*",
    }
    columns = []
    with reading(file) as opened:
        for keys in (STATE, ACTION):
            missing = [key for key in keys if not isinstance(opened.get(key), h5py.Dataset)]
            if missing:
                raise DataError(f"{file}: has no {missing[0]}; write a card that names the columns")
            shapes = [opened[key].shape for key in keys]  # type: ignore[union-attr]
            columns.append(ColumnCard(keys, sum(shape[1] if len(shape) > 1 else 1 for shape in shapes)))
    cameras = []
    for name in SERIALS:
        try:
            video = _video(file.parent, name)
            height, width = _size(video)
        except DataError:
            continue
        cameras.append(CameraCard(name, name, height, width))
    if not cameras:
        raise DataError(f"{file.parent}: no camera of its metadata has a video in recordings/MP4")
    robot = RobotCard("droid-franka", 15.0, "joint_velocity", tuple(cameras), *columns)
    source = InstructionCard("current_task")
    guesses["instruction.source"] = "as the operator was told; look at `inspect`"
    card = Card(name_of(path), "droid", str(path.resolve()), robot, source)
    return Draft(card, guesses)


def _with_flag(column: ColumnCard) -> ColumnCard:
    """Return the column with the flag of moving as its last dimension."""
    return replace(
        column,
        keys=(*column.keys, MOVING),
        dimensions=column.dimensions + 1,
        labels=(),
        low=(),
        high=(),
        scale=(*(column.scale or (1.0,) * column.dimensions), 1.0),
        offset=(*column.offset, 0.0) if column.offset else (),
    )


def _list(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    metadata = _metadata_file(path.parent)
    task = _metadata(metadata).get("current_task")
    yield Demonstration("/", _id_of(path.parent), str(task or path.parent.name), beside=metadata)


def _tell(card: Card, file: h5py.File, path: Path, demo: Demonstration) -> str:
    return _metadata(_metadata_file(path.parent)).get("current_task", "")


def _id_of(folder: Path) -> str:
    """Return the id of an episode: its UUID, which is in the name of its metadata."""
    return _metadata_file(folder).stem.removeprefix("metadata_")


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("metadata_*.json"))


def _metadata_file(folder: Path) -> Path:
    files = _metadata_files(folder)
    if len(files) != 1:
        raise DataError(f"{folder}: has {len(files)} files metadata_*.json, an episode has one")
    return files[0]


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        value = parse_json(plain_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not a JSON object")
    return value


def _video(folder: Path, key: str) -> Path:
    """Return the video of a camera of an episode."""
    serial: object = key
    if key in SERIALS:
        serial = _metadata(_metadata_file(folder)).get(SERIALS[key])
    elif not key.isdigit():
        known = [*SERIALS, "a serial number"]
        raise DataError(f"{folder}: no camera {key!r}; there are {', '.join(known)}{nearest(key, known)}")
    if serial and Path(str(serial)).name != str(serial):
        raise DataError(
            f"{_metadata_file(folder)}: {SERIALS[key]} is {serial!r}, which is no serial number of a camera"
        )
    path = folder / "recordings" / "MP4" / f"{serial}.mp4"
    if not serial or not path.is_file():
        present = ", ".join(sorted(p.name for p in path.parent.glob("*.mp4"))) or "none"
        raise DataError(
            f"{folder}: camera {key!r} has serial number {serial}; its video is missing ({present})"
        )
    return path


def _size(path: Path) -> tuple[int, int]:
    video = VideoFile(path)
    try:
        frame = video.read([0.0], 1e-6)[0]
    finally:
        video.close()
    return frame.shape[0], frame.shape[1]


def _first(path: Path) -> Path | None:
    """Return the first trajectory.h5 at or below `path`; None if none is near."""
    if not path.is_dir():
        return path if path.name == FILE and path.is_file() else None
    folders, seen = [path], 0
    for _ in range(DEEPEST):
        below: list[Path] = []
        for folder in folders:
            if (folder / FILE).is_file():
                return folder / FILE
            seen += 1
            if seen > MOST_FOLDERS:
                return None
            with os.scandir(folder) as listing:
                below += sorted(Path(e.path) for e in listing if e.is_dir() and not e.name.startswith("."))
        folders = below
    return None
