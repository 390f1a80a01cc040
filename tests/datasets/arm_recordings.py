"""Recordings in memory of an arm that moves smoothly, seen by two cameras of unlike scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets import Card, EpisodeInfo, EpisodeStore
from vlafit.datasets.card import CameraCard, ColumnCard, RobotCard

HEIGHT, WIDTH, STEPS, EPISODES = 48, 64, 90, 8
SENTENCE = "push the block"


@dataclass(frozen=True)
class Episode:
    """One recorded episode."""

    state: NDArray[np.float32]  # [T, 3]: x, y, gripper
    actions: NDArray[np.float32]  # [T, 3]: commands of all three, one step ahead
    front: NDArray[np.uint8]  # [T, h, w, 3]
    wrist: NDArray[np.uint8]
    instruction: str = SENTENCE


class Recording(EpisodeStore):
    """Recorded episodes in memory."""

    def __init__(self, recorded: list[Episode]) -> None:
        cameras = (CameraCard("front", "front", HEIGHT, WIDTH), CameraCard("wrist", "wrist", HEIGHT, WIDTH))
        columns = ColumnCard(("x",), 3, ("x", "y", "gripper"))
        self.card = Card(
            "recording", "libero", "", RobotCard("arm", 20, "position", cameras, columns, columns)
        )
        self.recorded = recorded
        self.episodes = tuple(
            EpisodeInfo(f"episode_{n}", "push", e.instruction, len(e.actions)) for n, e in enumerate(recorded)
        )

    def state(self, episode: int) -> NDArray[np.float32]:
        """Return the states."""
        return self.recorded[episode].state

    def actions(self, episode: int) -> NDArray[np.float32]:
        """Return the actions."""
        return self.recorded[episode].actions

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        """Return a frame."""
        return vars(self.recorded[episode])[camera][step]

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        """Return frames."""
        return vars(self.recorded[episode])[camera][list(steps)]

    def files(self) -> tuple[Path, ...]:
        """Return no file: all is in memory."""
        return ()


def recorded(seed: int = 0, episodes: int = EPISODES) -> list[Episode]:
    """Return episodes of an arm that moves smoothly at changing speed, seen by two unlike cameras."""
    return [_episode(seed, number) for number in range(episodes)]


@cache
def _episode(seed: int, number: int) -> Episode:
    """Draw an episode once; it is shared, so its arrays are read-only."""
    episode = _drawn(np.random.default_rng([seed, number]))
    for values in (episode.state, episode.actions, episode.front, episode.wrist):
        values.flags.writeable = False
    return episode


def _drawn(rng: np.random.Generator) -> Episode:
    time = np.arange(STEPS + 1) / 20
    pulses = sum(np.exp(-(((time - c) / 0.25) ** 2)) for c in rng.uniform(0.4, 4.2, 4))
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.15, STEPS + 1))
    velocity = 0.04 * pulses[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    at = np.clip(np.cumsum(velocity, axis=0), -0.45, 0.45)
    grasp = rng.integers(20, 70)
    gripper = 1 / (1 + np.exp(-(np.arange(STEPS + 1) - grasp) / 2))
    path = np.concatenate([at, gripper[:, None]], axis=1).astype(np.float32)
    state = path[:-1] + rng.normal(0, 1e-4, (STEPS, 3)).astype(np.float32)
    return Episode(state, path[1:], _render(at, rng, 0), _render(at, rng, 1))


def _render(at: NDArray, rng: np.random.Generator, scene: int) -> NDArray[np.uint8]:
    """Return a background with a colour and a direction of its own, and a bright blob where the arm is."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / [[[HEIGHT]], [[WIDTH]]]
    ground = np.stack(
        [200 * y, 120 * x + 20, 40 + 0 * x] if scene == 0 else [30 + 0 * x, 180 * x, 190 * (1 - y)], -1
    )
    frames = np.repeat(ground[None], STEPS, 0)
    for step in range(STEPS):
        blob = np.exp(-((x - 0.5 - at[step, 0]) ** 2 + (y - 0.5 - at[step, 1]) ** 2) / 0.01)
        frames[step] += 200 * blob[..., None]
    return np.clip(frames + rng.normal(0, 1, frames.shape), 0, 255).astype(np.uint8)
