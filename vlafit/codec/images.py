"""Camera frames to model frames: uint8 all the way, resized only where sizes differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.codec import area

Framing = Literal["openpi", "lerobot", "smolvla", "groot", "nvidia", "nvidia_area", "xvla", "openvla"]
"""A way to give an image the model's size, named after the reference that it was taken from, because
codec.json stores the name. LeRobot's differ between its policies: "lerobot" is that of its pi0 and pi0.5.
"groot" keeps no aspect: it makes the image square, cuts the middle out and enlarges that, bicubically as
LeRobot does or, in "nvidia", bilinearly as NVIDIA does; so does "openvla", whose authors also send frames
through JPEG, which is left out here. "nvidia_area" is that of NVIDIA's checkpoints with `use_albumentations`:
OpenCV's INTER_AREA, and frames that are no squares are not squeezed, so that they must be, or get a letter
box.
"""
MIDDLES: tuple[Framing, ...] = ("groot", "nvidia", "nvidia_area")
"""Framings that cut the middle out, of which `fit_image` takes `crop` and `letter_box`."""
GROOT_CROP = (
    230,
    256,
)  # of the side, the middle that is left: GR00T N1.7's image_crop_size, image_target_size
OPENVLA_CROP = 0.9  # of the area: openvla-oft, openvla_utils.py: center_crop_image


@dataclass(frozen=True)
class FramingRule:
    """One way to fit an image that keeps its aspect, interpolates bilinearly and pads with black.

    Without antialiasing floats are interpolated, which are rounded to whole grey levels here.
    """

    antialiased: bool
    centred: bool
    """False: the image is at the bottom right."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """The colour of the padding."""


FRAMINGS: Mapping[str, FramingRule] = {
    "openpi": FramingRule(antialiased=True, centred=True),
    "lerobot": FramingRule(antialiased=False, centred=True),
    "smolvla": FramingRule(antialiased=False, centred=False),
    # LeRobot pads X-VLA's images with 0 after ImageNet's mean was subtracted: with the mean, to a grey level.
    "xvla": FramingRule(antialiased=False, centred=False, fill=(124, 116, 104)),
}


def fit_image(
    image: NDArray[np.uint8], size: int, framing: Framing, crop: float = 0.0, letter_box: bool = False
) -> NDArray[np.uint8]:
    """Return `image` [h, w, 3] as [size, size, 3].

    Of the framings in MIDDLES, `crop` is the share of a side that is left of the middle (0: that of GR00T
    N1.7), and a letter box pads the image to a square with black first. An image that has the size already is
    returned, not copied, unless the framing cuts a part out of it.
    """
    if framing in MIDDLES:
        square = in_letter_box(image) if letter_box else image
        return _middle(square, size, framing, crop)
    if framing == "openvla":
        return cut_middle(lanczos(image, size, size), OPENVLA_CROP**0.5)
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


def groot_crop(size: int) -> int:
    """Return the side of the middle that the framings "groot" and "nvidia" cut out of `size` pixels."""
    return max(1, size * GROOT_CROP[0] // GROOT_CROP[1])


def in_letter_box(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `image` [h, w, 3] in the middle of a black square."""
    height, width = image.shape[:2]
    side = max(height, width)
    if height == width:
        return image
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _middle(image: NDArray[np.uint8], size: int, framing: Framing, crop: float) -> NDArray[np.uint8]:
    """Return the middle of `image`: as LeRobot 0.6.1 cuts it out for GR00T N1.7; as torchvision's Resize and
    CenterCrop do for NVIDIA; or as OpenCV and albumentations do for NVIDIA ("nvidia_area").
    """

    def resized(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if framing == "nvidia_area":
            return area.resized(values, size, size)
        return antialiased(values, size, size, linear=framing == "nvidia")

    square = resized(image)
    if framing == "nvidia_area":
        side = max(1, int(size * (crop or groot_crop(size) / size)))
    else:
        side = max(1, round(size * crop)) if crop else groot_crop(size)
    # torchvision rounds to even, the others downwards.
    first = round((size - side) / 2) if framing == "nvidia" else (size - side) // 2
    return resized(square[first : first + side, first : first + side])


def cut_middle(image: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """Return the middle of `image` [h, w, 3], `share` of each side, enlarged to [h, w, 3].

    As TensorFlow's crop_and_resize does with images in [0, 1], which are then scaled back to grey levels.
    """
    values: NDArray[np.float32] = image.astype(np.float32) / np.float32(255)
    for axis in (0, 1):
        have = image.shape[axis]
        at = np.linspace((1 - share) / 2, (1 + share) / 2, have) * (have - 1)
        low = np.clip(at.astype(np.int64), 0, max(have - 2, 0))
        part = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first, second = values.take(low, axis), values.take(np.minimum(low + 1, have - 1), axis)
        values = first + (second - first) * part
    return np.floor(values * 255.5).clip(0, 255).astype(np.uint8)


def lanczos(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Interpolate `image` [h, w, 3] with antialiasing, as TensorFlow's resize with "lanczos3"."""
    values: NDArray[np.float32] = image.astype(np.float32)
    for axis, wanted in ((0, height), (1, width)):
        if values.shape[axis] != wanted:
            weights = _lanczos_weights(values.shape[axis], wanted)
            values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return np.rint(values).clip(0, 255).astype(np.uint8)


@cache
def _lanczos_weights(have: int, wanted: int) -> NDArray[np.float32]:
    """Return weights [wanted, have]; a window of 3 lobes each way is as wide as the pixels that it joins."""
    scale = have / wanted
    distance = (np.arange(have) + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / max(scale, 1.0)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def bicubic(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Interpolate `image` [h, w, 3] bicubically; see `antialiased`."""
    return antialiased(image, height, width, linear=False)


def antialiased(image: NDArray[np.uint8], height: int, width: int, linear: bool) -> NDArray[np.uint8]:
    """Interpolate `image` [h, w, 3] with antialiasing, bit for bit as torch does with uint8 on a CPU."""
    values = image
    for axis, wanted in ((1, width), (0, height)):
        if values.shape[axis] == wanted:
            continue
        weights, bits = _whole_weights(values.shape[axis], wanted, linear)
        rows = np.moveaxis(values, axis, 0)
        # Whole numbers below 2^53, so that float64 sums are exact in any order.
        sums = weights @ rows.reshape(len(rows), -1).astype(np.float64)
        shifted = (sums.astype(np.int64) + (1 << (bits - 1))) >> bits
        new = shifted.clip(0, 255).astype(np.uint8).reshape(wanted, *rows.shape[1:])
        values = np.moveaxis(new, 0, axis)
    return np.ascontiguousarray(values)


@cache
def _whole_weights(have: int, wanted: int, linear: bool) -> tuple[NDArray[np.float64], int]:
    """Return whole-number weights [wanted, have], times 2^bits, and bits: torch's UpSampleKernel.cpp."""
    scale = have / wanted
    reach = 1.0 if linear else 2.0
    support, inverse = (reach * scale, 1.0 / scale) if scale >= 1 else (reach, 1.0)
    weights = np.zeros((wanted, have))
    for i in range(wanted):
        centre = scale * (i + 0.5)
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), have)
        x = np.abs((np.arange(first, last) - centre + 0.5) * inverse)
        near = (1.5 * x - 2.5) * x * x + 1  # a = -0.5, as Pillow has it
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.maximum(1 - x, 0.0) if linear else np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[i, first:last] = row / row.sum()
    most = max(weights.max(), 0.0)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + most * (1 << (b + 1))) >= 1 << 15)
    scaled = weights * (1 << bits)
    return np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)), bits


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
