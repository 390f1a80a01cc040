"""Camera frames to model frames: uint8 all the way, resized only where sizes differ."""

import numpy as np
from numpy.typing import NDArray


def resize_with_pad(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return `image` [h, w, 3] as [size, size, 3]: aspect kept, centred, padded with black.

    Bilinear with antialiasing, and the roundings of openpi's `image_tools.resize_with_pad`. An image that has
    the size already is returned as it is, not copied.
    """
    height, width = image.shape[:2]
    if height == size and width == size:
        return image
    from PIL import Image

    ratio = max(width / size, height / size)
    inner_height, inner_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (inner_width, inner_height), resample=Image.Resampling.BILINEAR
    )
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = int((size - inner_height) / 2), int((size - inner_width) / 2)
    padded[top : top + inner_height, left : left + inner_width] = np.asarray(resized)
    return padded
