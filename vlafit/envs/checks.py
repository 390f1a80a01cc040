"""Check an action's shape and values before a simulation step."""

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import SimulationError


def check_action(action: NDArray, size: int, where: str) -> NDArray[np.float32]:
    """Return `action` as float32 [size]. Raises SimulationError for a wrong shape or non-finite values."""
    array = np.asarray(action)
    if array.shape != (size,) or array.dtype.kind not in "fiu":
        raise SimulationError(
            f"{where}: an action must be {size} numbers, got shape {array.shape} of {array.dtype}; "
            "pass one step, not a chunk, in the robot's units"
        )
    if not np.isfinite(array).all():
        raise SimulationError(f"{where}: the action {array.tolist()} is not finite; the policy has diverged")
    return array.astype(np.float32)
