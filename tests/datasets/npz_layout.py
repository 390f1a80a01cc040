"""A dataset layout outside the package: an .npz file an episode, with columns and two cameras."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets import Card, EpisodeInfo, EpisodeStore

INSTRUCTIONS = ("file",)


@dataclass(frozen=True)
class Section:
    """The table [npz_layout] of a card."""

    sentence_key: str = "sentence"
    """The array that holds the instruction."""


def recognise(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.npz"))


def open(card: Card) -> EpisodeStore:
    return NpzStore(card)


class NpzStore(EpisodeStore):
    def __init__(self, card: Card) -> None:
        self.card = card
        self._paths = card.files((".npz",))
        key = card.options(Section).sentence_key
        self.episodes = tuple(
            EpisodeInfo(
                path.stem,
                path.stem.split("-")[0],
                str(self._read(n, key)),
                len(self._column(n, self.card.robot.action.keys)),
            )
            for n, path in enumerate(self._paths)
        )

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._column(self.require_episode(episode), self.card.robot.state.keys)

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._column(self.require_episode(episode), self.card.robot.action.keys)

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        declared = self.card.robot.cameras[self.camera_slot(camera)]
        step = self.require_step(episode, step)
        frame = declared.upright(self._read(episode, declared.key)[step])
        frame.flags.writeable = False
        return frame

    def files(self) -> tuple[Path, ...]:
        return tuple(self._paths)

    def _column(self, episode: int, keys: tuple[str, ...]) -> NDArray[np.float32]:
        rows = np.concatenate([self._read(episode, key) for key in keys], axis=1).astype(np.float32)
        rows.flags.writeable = False
        return rows

    def _read(self, episode: int, key: str) -> NDArray:
        with np.load(self._paths[episode]) as arrays:
            return arrays[key]


def write(folder: Path, demos: list, card: Card) -> Card:
    """Write demonstrations in this layout, and return their card."""
    folder.mkdir(parents=True)
    for number, demo in enumerate(demos):
        columns = {"ee": demo.position, "gripper": demo.gripper, "act": demo.actions}
        frames = {"front": demo.front[:, ::-1, ::-1], "wrist": demo.wrist}
        name = f"{demo.task}-{number:03d}.npz"
        np.savez(folder / name, **columns, **frames, sentence=np.array(demo.instruction))
    robot = card.robot
    cameras = tuple(replace(camera, key=camera.name) for camera in robot.cameras)
    state, action = replace(robot.state, keys=("ee", "gripper")), replace(robot.action, keys=("act",))
    robot = replace(robot, cameras=cameras, state=state, action=action)
    instruction = replace(card.instruction, source="file")
    return replace(card, layout=__name__, path=str(folder), robot=robot, instruction=instruction)
