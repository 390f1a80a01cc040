"""PushT whose state also holds where the block is: gym-pusht's `environment_state_agent_pos`."""

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec
from vlafit.envs.experts_pusht import PushTExpert
from vlafit.envs.pusht import PushT
from vlafit.types import Feature

SHARES_PROCESS = True  # several environments in one process draw what each draws alone
KEYPOINTS = 8  # corners of the two rectangles of the T, in gym-pusht's order
LABELS = tuple(f"{axis}{corner}" for corner in range(KEYPOINTS) for axis in "xy")


class PushTKeypoints(PushT):
    """PushT with the state [18]: the disc's position, then eight keypoints (x, y) of the block, in pixels.

    Everything else, pictures and success included, is that of `vlafit.envs.pusht`.
    """

    STATE = Feature(
        "state",
        (2 + 2 * KEYPOINTS,),
        "px",
        ("x", "y", *(f"{axis}{i}" for i in range(KEYPOINTS) for axis in "xy")),
    )

    def _state(self, full_state: NDArray[np.float64]) -> NDArray[np.float32]:
        simulation = self._simulation
        keypoints = simulation.get_keypoints(simulation._block_shapes)  # [8, 2]
        return np.concatenate([full_state[:2], keypoints.ravel()]).astype(np.float32)


def make(spec: EnvSpec) -> PushTKeypoints:
    """Create PushT with keypoints as `spec` describes."""
    return PushTKeypoints(spec)


def make_expert() -> PushTExpert:
    """Create the expert that plans pushes."""
    return PushTExpert()
