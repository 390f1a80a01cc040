"""Camera poses and pixel rays, shared by all renderers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class View:
    """A pinhole camera with square pixels at one time step.

    `position` is float64 [3] in metres in the world. The columns of `rotation` [3, 3] are the image's right,
    its up, and the direction opposite to the line of sight, in the world (MuJoCo's convention). `fovy` is the
    vertical field of view in degrees. `fixed`: the camera never moves during an episode.
    """

    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    fovy: float
    fixed: bool

    def rays(self, size: int) -> NDArray[np.float64]:
        """Return the world directions [size, size, 3] of the rays through the pixel centres."""
        across = (np.arange(size) + 0.5) / size * 2 - 1
        half = np.tan(np.deg2rad(self.fovy) / 2)
        x, y = np.meshgrid(across * half, -across * half)
        rays = np.stack([x, y, -np.ones_like(x)], axis=-1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        return rays @ self.rotation.T


def look_at(position: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Return the rotation [3, 3] of a camera at `position` that looks at `target` (both m), z up."""
    back = np.asarray(position, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back], axis=1)


def from_quaternion(quaternion: ArrayLike) -> NDArray[np.float64]:
    """Return the rotation [3, 3] of a unit quaternion (w, x, y, z)."""
    w, x, y, z = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
