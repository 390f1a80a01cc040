"""A dataset layout: a folder an episode, with steps.csv, task.txt and a folder of PNG files a camera."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlafit.datasets import Card, Draft, EpisodeInfo, EpisodeStore
from vlafit.datasets.card import CameraCard, ColumnCard, RobotCard
from vlafit.errors import DataError

INSTRUCTIONS = ("task.txt",)


@dataclass(frozen=True)
class Section:
    """The table [png_folders] of a card."""

    steps: str = "steps.csv"
    """The file with a row for each step, in each episode's folder."""


def recognise(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*/task.txt"))


def open(card: Card) -> EpisodeStore:
    return PngFolders(card)


def describe(path: Path) -> Draft:
    """Draft a card from the first episode's columns and pictures."""
    first = min(path.glob("*/task.txt")).parent
    with (first / Section().steps).open(newline="", encoding="utf-8") as file:
        names = [name.rsplit("_", 1)[0] for name in next(csv.reader(file), [])]
    widths = {key: names.count(key) for key in names}
    if len(widths) != 2:
        raise DataError(f"{file.name}: needs columns NAME_0, ... of one state and one action, not {names}")
    state, action = (ColumnCard((key,), width) for key, width in widths.items())
    cameras = []
    for frame in sorted(first.glob("*/0000.png")):
        with Image.open(frame) as picture:
            cameras.append(CameraCard(frame.parent.name, frame.parent.name, picture.height, picture.width))
    robot = RobotCard("robot", 0.0, "", tuple(cameras), state, action)
    guesses = {
        "robot.state.keys": "the first columns of steps.csv",
        "robot.action.keys": "the other columns of steps.csv",
    }
    missing = {
        "robot.hz": "control rate, steps a second",
        "robot.control": "what an action means, for example joint_position",
    }
    return Draft(Card(path.resolve().name, "png_folders", str(path.resolve()), robot), guesses, missing)


class PngFolders(EpisodeStore):
    def __init__(self, card: Card) -> None:
        self.card = card
        self._name = card.options(Section).steps
        self._folders = sorted(path.parent for path in card.location().glob(f"*/{self._name}"))
        if not self._folders:
            raise DataError(f"{card.location()}: no folder has a {self._name}")
        self._columns = [self._read(folder) for folder in self._folders]
        self.episodes = tuple(
            EpisodeInfo(folder.name, sentence, sentence, len(columns[1]))
            for folder, columns, sentence in zip(
                self._folders, self._columns, map(self._sentence, self._folders), strict=True
            )
        )

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._columns[self.require_episode(episode)][0]

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._columns[self.require_episode(episode)][1]

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        step = self.require_step(episode, step)
        declared = self.card.robot.cameras[self.camera_slot(camera)]
        path = self._folders[episode] / declared.key / f"{step:04d}.png"
        with Image.open(path) as file:
            frame = declared.upright(np.array(file.convert("RGB")))
        if frame.shape != (declared.height, declared.width, 3):
            raise DataError(f"{path}: is {frame.shape}, the card says {declared.height}x{declared.width}")
        frame.flags.writeable = False
        return frame

    def files(self) -> tuple[Path, ...]:
        return tuple(folder / self._name for folder in self._folders)

    def _sentence(self, folder: Path) -> str:
        if self.card.instruction.source == "card":
            return self.card.instruction.sentence(folder.name, str(folder))
        return (folder / "task.txt").read_text(encoding="utf-8").strip()

    def _read(self, folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return states and actions. A key such as "joint" means the columns joint_0, joint_1, ..."""
        with (folder / self._name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        made = []
        for column in (self.card.robot.state, self.card.robot.action):
            names = [n for key in column.keys for n in rows[0] if n == key or n.startswith(f"{key}_")]
            if len(names) != column.dimensions:
                raise DataError(
                    f"{folder / self._name}: {column.keys} are {len(names)} columns ({', '.join(names)}), "
                    f"the card says {column.dimensions}"
                )
            values = np.array([[float(row[name]) for name in names] for row in rows], np.float32)
            values.flags.writeable = False
            made.append(values)
        return made[0], made[1]
