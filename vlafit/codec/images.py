"""Camera frames to model frames: uint8 all the way, resized only where sizes differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Framing = Literal["openpi", "lerobot", "smolvla", "xvla"]
"""A way to give an image the model's size, named after the reference that it was taken from, because
codec.json stores the name. LeRobot's differ between its policies: "lerobot" is that of its pi0 and pi0.5.
"""


@dataclass(frozen=True)
class FramingRule:
    """One way to fit an image. All keep its aspect, interpolate bilinearly and pad with one colour.

    Without antialiasing floats are interpolated, which are rounded to whole grey levels here.
    """

    antialiased: bool
    centred: bool
    """False: the image is at the bottom right."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """The colour of the padding."""


FRAMINGS: Mapping[Framing, FramingRule] = {
    "openpi": FramingRule(antialiased=True, centred=True),
    "lerobot": FramingRule(antialiased=False, centred=True),
    "smolvla": FramingRule(antialiased=False, centred=False),
    # LeRobot pads X-VLA's images with 0 after ImageNet's mean was subtracted: with the mean, to a grey level.
    "xvla": FramingRule(antialiased=False, centred=False, fill=(124, 116, 104)),
}


def fit_image(image: NDArray[np.uint8], size: int, framing: Framing) -> NDArray[np.uint8]:
    """Return `image` [h, w, 3] as [size, size, 3]; one that has the size already is returned, not copied."""
    height, width = image.shape[:2]
    if height == size and width == size:
        return image
    rule = FRAMINGS[framing]
    if rule.antialiased:
        return resize_with_pad(image, size)
    ratio = max(width / size, height / size)
    inner = np.rint(bilinear(image, max(1, int(height / ratio)), max(1, int(width / ratio))))
    rows, columns = size - inner.shape[0], size - inner.shape[1]
    top, left = (rows // 2, columns // 2) if rule.centred else (rows, columns)
    padded = np.full((size, size, 3), rule.fill, dtype=np.uint8)
    padded[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return padded


def bilinear(image: NDArray, height: int, width: int) -> NDArray[np.float32]:
    """Interpolate `image` [h, w, 3] as torch's `F.interpolate(mode="bilinear")`, without antialiasing."""
    values: NDArray[np.float32] = image.astype(np.float32)
    for axis, wanted in ((0, height), (1, width)):
        have = image.shape[axis]
        at = np.maximum((np.arange(wanted) + 0.5) * (have / wanted) - 0.5, 0.0)
        low = np.minimum(at.astype(np.int64), have - 1)
        share = (at - low).reshape(-1, 1, 1) if axis == 0 else (at - low).reshape(1, -1, 1)
        first, second = values.take(low, axis), values.take(np.minimum(low + 1, have - 1), axis)
        values = (first + (second - first) * share.astype(np.float32)).astype(np.float32)
    return values


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
