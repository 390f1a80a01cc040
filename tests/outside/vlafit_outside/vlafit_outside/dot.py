"""A simulation: a dot on a square that must be moved up or down."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.checks import check_action
from vlafit.types import Embodiment, Feature, Observation


class Dot:
    """A dot on a square that must be moved to a corner."""

    tasks = ("up", "down")

    def __init__(self, spec: EnvSpec) -> None:
        camera = Feature("top", (spec.size, spec.size, 3))
        self.embodiment = Embodiment(
            "dot", (camera,), Feature("state", (2,)), Feature("action", (2,)), 10.0, "delta_position", "ray"
        )
        self.versions: Mapping[str, str] = {"dot": "1"}
        self._horizon = spec.horizon or 50

    def instruction(self, task: str) -> str:
        return f"move {task}"

    def reset(self, task: str, seed: int) -> Observation:
        self._task, self._steps = task, 0
        self._at = np.random.default_rng(seed).uniform(-0.5, 0.5, 2)
        return self._seen()

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        self._steps += 1
        self._at = np.clip(self._at + 0.1 * check_action(action, 2, "dot"), -1, 1)
        reached = self._at[1] > 0.8 if self._task == "up" else self._at[1] < -0.8
        return self._seen(render), bool(reached), self._steps >= self._horizon

    def close(self) -> None:
        pass

    def _seen(self, render: bool = True) -> Observation:
        size = self.embodiment.cameras[0].shape[0]
        image = np.zeros((size, size, 3), np.uint8)
        row, column = ((self._at + 1) / 2 * (size - 1)).astype(int)
        image[row, column] = 255
        return Observation(
            {"top": image} if render else {}, self._at.astype(np.float32), f"move {self._task}"
        )


def make(spec: EnvSpec) -> Dot:
    return Dot(spec)
