"""Episodes of a disc that moves over a textured ground of 32 pixels, by three joints and a gripper."""

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tests.datasets.arm_recordings import Episode

Path = Literal["via points", "circle", "walk", "lissajous", "reach"]
RADIUS = 0.09  # of the image's side


def scene(path: Path, number: int, seed: int, noise: float = 0.0, side: int = 32) -> Episode:
    """Return an episode of 50 to 79 steps; `noise` is that of a pixel in grey levels."""
    rng = np.random.default_rng([seed, number])
    steps = int(rng.integers(50, 80))
    at = _path(path, rng, steps + 1)
    angle, reach = np.arctan2(at[:, 1], at[:, 0] + 0.6), np.hypot(at[:, 0] + 0.6, at[:, 1])
    elbow = 2 * np.arcsin(np.clip(reach / 1.4, -1, 1))
    gripper = np.arange(steps + 1) > 0.6 * steps
    joints = np.stack([angle - elbow / 2, elbow, at[:, 0] / 2, gripper], axis=1)
    state = (joints[:-1] + rng.normal(0, 1e-4, (steps, 4))).astype(np.float32)
    frames = _rendered(at[:-1], rng, noise, side)
    return Episode(state, joints[1:].astype(np.float32), frames, frames, "move the disc")


def late(e: Episode, steps: int) -> Episode:
    """Return the episode with its video some frames late."""
    frames = np.concatenate([e.front[:1].repeat(steps, 0), e.front[:-steps]])
    return Episode(e.state, e.actions, frames, frames, e.instruction)


def _smooth(steps: int) -> NDArray[np.float64]:
    time = np.linspace(0, 1, steps)
    return 10 * time**3 - 15 * time**4 + 6 * time**5


def _path(path: Path, rng: np.random.Generator, steps: int) -> NDArray[np.float64]:
    """Return places [steps, 2] within half an image of its middle."""
    time = np.arange(steps)[:, None]
    if path == "circle":  # at a steady speed
        angle = rng.uniform(0, 6.28) + rng.choice([-1, 1]) * rng.uniform(0.06, 0.12) * time[:, 0]
        return rng.uniform(0.2, 0.35) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if path == "walk":
        kernel = np.hanning(15) / np.hanning(15).sum()
        speed = [np.convolve(rng.normal(0, 0.03, steps + 30), kernel, "same")[15 : 15 + steps] for _ in "xy"]
        return 0.35 * np.tanh(np.cumsum(speed, axis=1).T / 0.35)
    if path == "lissajous":
        return 0.33 * np.sin(0.1 * rng.uniform(0.5, 1.5, 2) * time + rng.uniform(0, 6.28, 2))
    if path == "reach":  # one motion, and a wait at its end
        start, end = rng.uniform(-0.3, 0.3, (2, 2))
        moving = int(steps * rng.uniform(0.6, 0.95))
        return start + (end - start) * np.r_[_smooth(moving), np.ones(steps - moving)][:, None]
    points = np.concatenate([np.zeros((1, 2)), rng.uniform(-0.35, 0.35, (3, 2))])
    each = _smooth(steps // 3 + 1)[:, None]
    return np.concatenate([a + (b - a) * each for a, b in pairwise(points)])[:steps]


def _rendered(at: NDArray, rng: np.random.Generator, noise: float, side: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    cells = np.random.default_rng(3).uniform(30, 120, (side // 4, side // 4, 3))
    ground = cells.repeat(4, 0).repeat(4, 1)
    distance = np.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None])  # [T, h, w]
    share = np.clip((RADIUS - distance) * side + 0.5, 0, 1)[..., None]
    frames = ground * (1 - share) + np.array([220, 60, 40]) * share
    return np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)
