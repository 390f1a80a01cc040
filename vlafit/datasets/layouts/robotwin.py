"""RoboTwin's HDF5 layout: a file an episode, rows of JPEG, and the next joint state as the action.

`/joint_action/{left_arm,left_gripper,right_arm,right_gripper}` and `/observation/<camera>/rgb` hold one row a
step. The sentences of data/episode0.hdf5 are in instructions/episode0.json, and video/episode0.mp4 shows its
head camera: a camera with the key "../video/{stem}.mp4" is read from there, where the file holds no frames.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from vlafit.datasets.card import CameraCard, Card, Draft, InstructionCard, RowsCard
from vlafit.datasets.filmed import FilmedStore
from vlafit.datasets.hdf5 import Hdf5Store, whole_file
from vlafit.datasets.hdf5_demos import SOURCES, Hdf5Layout, LinkedFolders
from vlafit.datasets.hdf5_draft import Known, draft
from vlafit.datasets.hdf5_files import SUFFIXES, first_file, names_of, reading, shared_folder
from vlafit.datasets.pictures import CLEARER, colour_distances, decode_marked
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError

INSTRUCTIONS = ("", *SOURCES)
"""The files hold none of their own."""
Section = LinkedFolders
JOINTS = tuple(f"joint_action/{part}" for part in ("left_arm", "left_gripper", "right_arm", "right_gripper"))
BESIDE = "../instructions/{stem}.json"
VIDEO, HEAD = "../video/{stem}.mp4", "observation/head_camera/rgb"


def recognise(path: Path) -> bool:
    """Whether the HDF5 files at `path` have the groups /joint_action and /observation."""
    file = first_file(path)
    if file is None:
        return False
    with reading(file) as opened:
        return all(isinstance(opened.get(name), h5py.Group) for name in ("joint_action", "observation"))


def open(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    layout = Hdf5Layout(whole_file, linked=card.options(Section).linked)
    robot = card.robot
    held = tuple(camera for camera in robot.cameras if not camera.key.endswith(".mp4"))
    if held == robot.cameras:
        return RoboTwinStore(card, layout)
    store = RoboTwinStore(replace(card, robot=replace(robot, cameras=held)), layout)
    try:
        return FilmedStore(card, store, store.video, exact=True)
    except BaseException:
        store.close()
        raise


class RoboTwinStore(Hdf5Store):
    """Episodes of HDF5 files with a video of the head camera beside each."""

    def video(self, info: EpisodeInfo, key: str) -> Path:
        """Return the video that a camera's key names. Raises DataError if it is missing."""
        data = self._file(info)
        path = _beside(data, key)
        if not path.is_file():
            raise DataError(f"{data}: camera key {key!r} is {path}, which is missing")
        return path

    def film_beside(self, episode: int, camera: str) -> Path | None:
        """Return the video of the head camera, whose colours are right."""
        if self.card.robot.cameras[self.camera_slot(camera)].key != HEAD:
            return None
        path = _beside(self._file(self.episodes[self.require_episode(episode)]), VIDEO)
        return path if path.is_file() else None

    def _file(self, info: EpisodeInfo) -> Path:
        return self._own[info.id]

    @cached_property
    def _own(self) -> dict[str, Path]:
        """Return the file of each episode by its id."""
        own = [path.resolve() for path in self.card.files(SUFFIXES)]
        return dict(zip(names_of(own, shared_folder(own)), own, strict=True))


def describe(path: Path) -> Draft:
    """Draft the card of the files at `path`."""
    file = first_file(path)
    assert file is not None
    beside = _beside(file, BESIDE).is_file()
    instruction = InstructionCard("beside", key="seen", file=BESIDE) if beside else InstructionCard("card")
    video = _beside(file, VIDEO)
    filmed = ()
    if video.is_file():
        height, width = _first_frame(video).shape[:2]
        filmed = (CameraCard("head_camera", VIDEO, height, width),)
    drafted = draft(
        path,
        Known(
            "robotwin",
            "/",
            state=(JOINTS, ("joint_action/vector",)),
            action=(JOINTS, ("joint_action/vector",)),
            instruction=instruction,
            rows=RowsCard(action_shift=1),
            robot="robotwin",
            control="joint_position",
            filmed=filmed,
            guesses={"rows.action_shift": "RoboTwin's own readers take the next joint state as the action"},
        ),
    )
    return _with_channels(drafted, file, video) if filmed else drafted


def _beside(file: Path, name: str) -> Path:
    return (file.parent / name.replace("{stem}", file.stem)).resolve()


def _first_frame(video: Path) -> np.ndarray:
    opened = VideoFile(video)
    try:
        return opened.read([0.0], 1e-6)[0]
    finally:
        opened.close()


def _with_channels(drafted: Draft, file: Path, video: Path) -> Draft:
    """Fill in the order of red and blue where the video beside tells that of the head camera."""
    unknown = [key for key in drafted.missing if key.endswith(".channels")]
    if not unknown:
        return drafted
    with reading(file) as opened:
        rows = opened.get(HEAD)
        if not isinstance(rows, h5py.Dataset) or not len(rows):
            return drafted
        row = rows[0]
        frame, _ = decode_marked(bytes(row) if isinstance(row, bytes) else row.tobytes(), f"{file}: {HEAD}")
    shown = _first_frame(video)
    if shown.shape != frame.shape:
        return drafted
    away = dict(zip(("rgb", "bgr"), colour_distances(frame, shown), strict=True))
    order = min(away, key=lambda one: away[one])
    if away[order] > CLEARER * max(away.values()):
        return drafted
    levels = " and ".join(f"{away[one]:.1f} as {one}" for one in away)
    reason = f"as {video.name} shows the head camera: {levels} grey levels away"
    cameras = tuple(
        replace(camera, channels=order) if f"robot.cameras.{n}.channels" in unknown else camera
        for n, camera in enumerate(drafted.card.robot.cameras)
    )
    return Draft(
        replace(drafted.card, robot=replace(drafted.card.robot, cameras=cameras)),
        {**drafted.guesses, **dict.fromkeys(unknown, reason)},
        {key: text for key, text in drafted.missing.items() if key not in unknown},
    )
