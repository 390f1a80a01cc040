"""A tiny environment for tests: a dot on a line that must be moved to the goal; no simulator.

Tasks share one scene, drawn from the seed alone; which goal counts is the task's. Some tasks break on
purpose, at step 3 of the episodes whose seed is odd.
"""

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.errors import SimulationError
from vlafit.types import Embodiment, Feature, Observation

SHARES_PROCESS = True
SENTENCES = {
    "left": "go to the left",
    "right": "go to the right",
    "raise": "go left and raise",
    "die": "go left and die",
    "hang": "go left and hang",
    "die-in-reset": "die at once",
    "late": "begin late",
    "left-again": "go to the left",
    "nan": "go left and lose count",
    "short": "go left and lose a joint",
    "text": "go left and talk",
    "float": "go left and blur",
    "blind": "go left and go blind",
    "maybe": "go left, perhaps",
    "near": "leave the start",
    "done": "do nothing",
    "few": "go left while there are starts",
}
FEW = 103  # seeds of the task `few` are below


def robot(size: int = 16, renderer: str = "ray") -> Embodiment:
    return Embodiment(
        name="dot",
        cameras=(Feature("front", (size, size, 3)),),
        state=Feature("state", (2,)),
        action=Feature("action", (2,)),
        hz=10.0,
        control="delta_position",
        renderer=renderer,
    )


class ToyEnv:
    tasks = tuple(SENTENCES)

    def __init__(self, spec: EnvSpec) -> None:
        self.embodiment = robot(spec.size, spec.renderer)
        self.versions: Mapping[str, str] = {"toy": "1.0"}
        self._horizon = spec.horizon or 1000

    def instruction(self, task: str) -> str:
        return SENTENCES[task]

    def missing_start(self, task: str, seeds: range) -> str:
        if task != "few" or seeds.stop <= FEW:
            return ""
        return f"task {task!r}: there is no start {max(FEW, seeds.start)}; set at most {FEW}"

    def reset(self, task: str, seed: int) -> Observation:
        if missing := self.missing_start(task, range(seed, seed + 1)):
            raise SimulationError(missing)
        if task == "die-in-reset" and seed % 2:
            os._exit(7)
        if task == "late" and seed % 2:
            threading.Event().wait(0.3)
        self._task, self._seed, self._steps = task, seed, 0
        self._at = np.random.default_rng(seed).uniform(-0.3, 0.3, 2).astype(np.float32)
        self._from, self._left_start = self._at.copy(), False
        return self._observe(True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        self._steps += 1
        if self._steps == 3 and self._seed % 2:
            match self._task:
                case "raise":
                    raise RuntimeError("the dot fell off the line")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    threading.Event().wait()  # never comes
        self._at = np.clip(self._at + 0.1 * np.asarray(action, np.float32), -1, 1)
        goal = 0.9 if self._task == "right" else -0.9
        success = bool(abs(self._at[0] - goal) < 0.15)
        self._left_start |= bool(abs(self._at - self._from).max() > 0.15)  # as simulations: once and for all
        success = {"near": self._left_start, "done": True}.get(self._task, success)
        observation = self._observe(render)
        if self._seed % 2 and self._steps >= 3:
            observation, success = _spoilt(observation, success, self._task)
        return observation, success, self._steps >= self._horizon

    def close(self) -> None:
        pass

    def _observe(self, render: bool) -> Observation:
        images = {}
        if render:
            size = self.embodiment.cameras[0].shape[0]
            image = np.zeros((size, size, 3), np.uint8)
            column, row = ((self._at + 1) / 2 * (size - 1)).astype(int)
            image[row, column] = 255
            images["front"] = image
        return Observation(images, self._at.copy(), SENTENCES[self._task])


def _spoilt(observation: Observation, success: bool, task: str) -> tuple[Observation, bool]:
    """Return what a faulty environment would report instead."""
    blurred = {name: picture.astype(np.float32) for name, picture in observation.images.items()}
    states = {"nan": observation.state * np.nan, "short": observation.state[:1], "text": np.array(["a", "b"])}
    images = {"float": blurred, "blind": {}}
    spoilt = replace(
        observation,
        state=states.get(task, observation.state),
        images=images.get(task, observation.images),
    )
    return spoilt, "no" if task == "maybe" else success  # type: ignore[return-value]


def make(spec: EnvSpec) -> ToyEnv:
    if spec.cameras == ("torch",):  # the way for a test to look into an environment process
        import sys

        raise RuntimeError(f"torch is {'' if 'torch' in sys.modules else 'not '}loaded")
    if spec.renderer == "osmesa":
        return Undrawable(spec)
    return ToyEnv(spec)


class Undrawable(ToyEnv):
    """Can be created, but its renderer cannot draw."""

    def _observe(self, render: bool) -> Observation:
        if render:
            raise SimulationError("renderer 'osmesa' does not work here")
        return super()._observe(render)
