"""An environment with the robot of LIBERO and no simulator, of which every picture and state is known.

The hand follows its actions by a hundredth of them, and the second finger shows the last gripper's action.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.types import Embodiment, Feature, Observation

SENTENCE = "pick up the alphabet soup and place it in the basket"
START = np.array([-0.05, 0.03, 0.6, 3.1, -0.2, -0.1, 0.02, -0.02], np.float32)
AXES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")


def picture(camera: str, step: int, size: int) -> NDArray[np.uint8]:
    """Return a frame [size, size, 3] that differs by camera and step, and from itself turned or mirrored."""
    rng = np.random.default_rng([len(camera), step])
    coarse = rng.integers(0, 256, (8, 8, 3)).repeat(size // 8 + 1, 0).repeat(size // 8 + 1, 1)
    fine = rng.integers(0, 32, (size, size, 3))
    return np.clip(coarse[:size, :size] // 2 + fine, 0, 255).astype(np.uint8)


def after(state: NDArray[np.float32], action: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the state [8] after an action [7]."""
    moved = state.copy()
    moved[:6] += np.float32(0.01) * action[:6]
    moved[7] = action[6]
    return moved


class LiberoLike:
    tasks = ("soup",)

    def __init__(self, spec: EnvSpec) -> None:
        self.size = spec.size
        self.embodiment = Embodiment(
            name="libero-panda",
            cameras=tuple(Feature(camera, (spec.size, spec.size, 3)) for camera in ("agentview", "wrist")),
            state=Feature("state", (8,), "", (*AXES, "finger_left", "finger_right")),
            action=Feature(
                "action", (7,), "", (*(f"d{axis}" for axis in AXES), "gripper"), (-1.0,) * 7, (1.0,) * 7
            ),
            hz=20.0,
            control="delta_pose",
            renderer="egl-2",
        )
        self.versions: Mapping[str, str] = {"libero-like": "1.0"}

    def instruction(self, task: str) -> str:
        return SENTENCE

    def reset(self, task: str, seed: int) -> Observation:
        self.state, self.steps = START.copy(), 0
        return self._observe(True)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> tuple[Observation, bool, bool]:
        self.state, self.steps = after(self.state, np.asarray(action, np.float32)), self.steps + 1
        return self._observe(render), False, False

    def close(self) -> None:
        pass

    def _observe(self, render: bool) -> Observation:
        cameras = self.embodiment.cameras if render else ()
        images = {camera.name: picture(camera.name, self.steps, self.size) for camera in cameras}
        return Observation(images, self.state.copy(), SENTENCE)


def make(spec: EnvSpec) -> LiberoLike:
    return LiberoLike(spec)
