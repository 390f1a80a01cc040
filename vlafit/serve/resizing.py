"""Scale the frames of a client whose cameras have another size than the robot's, and say so once for each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlafit.codec import area
from vlafit.types import Feature


class Resizing:
    """Scales pixels as OpenCV's INTER_AREA does: means of areas, or linearly where frames become larger.

    Only frames of the camera's shape (ratio of height and width) are scaled; of all others the check that
    follows says what is wrong with them.
    """

    def __init__(self, say: Callable[[Sequence[str]], object]) -> None:
        self._say = say
        self._scaled: set[str] = set()

    def __call__(self, camera: Feature, pixels: Any) -> Any:
        """Return the pixels at the camera's size."""
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3:
            return pixels
        (have_h, have_w, channels), (height, width) = pixels.shape, camera.shape[:2]
        if (have_h, have_w) == (height, width) or channels != 3 or not have_h:
            return pixels
        if have_h * width != have_w * height:
            return pixels
        if camera.name not in self._scaled:
            self._scaled.add(camera.name)
            sizes = f"{have_h}x{have_w} are scaled to the robot's {height}x{width}"
            self._say([f"camera {camera.name!r}: frames of {sizes}, because the server resizes"])
        return area.resized(pixels, height, width)
