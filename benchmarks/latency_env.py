"""A point that has to pass a pillar on either side: where policies differ when their chunks arrive late.

Nothing that is seen says on which side to pass before the point has begun to turn, so a chunk may choose the
side that the one before it did not, and the point then hits the pillar.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.types import Embodiment, Feature, Observation

TASK, SENTENCE = "pass", "pass the pillar"
PILLAR = 0.35  # its radius, around the origin
WIDE, FORWARD = 0.6, 0.05  # how far to the side the demonstrations pass; steps along the way
DRIFT = 0.015  # deviation of what pushes the point at every step
SIDE = 8  # pixels
CARD = f"""
name = "pillar"
layout = "libero"
path = "pillar"

[instruction]
source = "attrs"

[robot]
name = "point"
hz = 10.0
control = "delta_position"
renderer = "ray"
state = {{ keys = ["obs/at"], dimensions = 2 }}
action = {{ keys = ["actions"], dimensions = 2 }}

[[robot.cameras]]
name = "front"
key = "obs/front"
height = {SIDE}
width = {SIDE}
"""


class Pillar:
    """The environment: an episode succeeds when the point is past the pillar and never touched it."""

    tasks = (TASK,)

    def __init__(self, spec: EnvSpec) -> None:
        self.embodiment = Embodiment(
            name="point",
            cameras=(Feature("front", (SIDE, SIDE, 3)),),
            state=Feature("state", (2,)),
            action=Feature("action", (2,)),
            hz=10.0,
            control="delta_position",
            renderer=spec.renderer,
        )
        self.versions: Mapping[str, str] = {"pillar": "1"}
        self._horizon = spec.horizon or 80

    def instruction(self, task: str) -> str:
        """Return the only sentence."""
        return SENTENCE

    def reset(self, task: str, seed: int) -> Observation:
        """Put the point before the pillar."""
        self._rng = np.random.default_rng(seed)
        self._at, self._steps, self._hit = start(self._rng), 0, False
        return self._observe()

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        """Move the point, which drifts a little, too."""
        self._steps += 1
        self._at = self._at + np.clip(action, -0.2, 0.2) + self._rng.normal(0, DRIFT, 2)
        self._hit |= bool(np.hypot(*self._at) < PILLAR)
        passed = bool(self._at[1] > 0.8)
        return self._observe(), passed and not self._hit, self._hit or self._steps >= self._horizon

    def close(self) -> None:
        """Nothing is open."""

    def _observe(self) -> Observation:
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        return Observation({"front": picture}, self._at.astype(np.float32), SENTENCE)


def make(spec: EnvSpec) -> Pillar:
    """Make the environment."""
    return Pillar(spec)


def start(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return where an episode starts."""
    return np.array([rng.normal(0, 0.03), -1.0])


def demonstrate(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions and actions [steps, 2] of a demonstration that passes on a side drawn by chance."""
    at, side, states, actions = start(rng), rng.choice([-1.0, 1.0]), [], []
    while at[1] < 0.9:
        y = at[1] + FORWARD
        wanted = side * WIDE * np.cos(np.pi / 2 * np.clip(y, -1, 1)) ** 2
        action = np.array([np.clip(0.5 * (wanted - at[0]), -0.12, 0.12), FORWARD])
        states.append(at)
        actions.append(action)
        at = at + action + rng.normal(0, DRIFT, 2)
    return np.array(states), np.array(actions)


def write_demonstrations(folder: Path, episodes: int, seed: int = 0) -> Path:
    """Write demonstrations in LIBERO's layout, and return their card."""
    rng = np.random.default_rng(seed)
    (folder / "pillar").mkdir(parents=True)
    with h5py.File(folder / "pillar" / f"{TASK}_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": SENTENCE})
        for number in range(episodes):
            states, actions = demonstrate(rng)
            group = data.create_group(f"demo_{number}")
            group.create_dataset("actions", data=actions.astype(np.float32))
            group.create_dataset("obs/at", data=states.astype(np.float32))
            group.create_dataset("obs/front", data=np.zeros((len(actions), SIDE, SIDE, 3), np.uint8))
    (folder / "pillar.toml").write_text(CARD)
    return folder / "pillar.toml"
