"""Resize frames as OpenCV's INTER_AREA does, bit for bit: means of areas where pixels join, else linearly.

Sums are float32 in OpenCV's order (imgproc/src/resize.cpp), because a grey level may lie at a half.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 1e-3  # parts of a pixel below it are left out: computeResizeAreaTab
EPSILON = float(np.finfo(np.float64).eps)  # ratios as near to whole numbers are whole
COEFFICIENTS = 2048  # of linear weights, as whole numbers: INTER_RESIZE_COEF_SCALE


def resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return `image` [h, w, 3] as [height, width, 3]."""
    have = image.shape[:2]
    if have == (height, width):
        return image
    if height > have[0] or width > have[1]:
        return _linear(image, height, width)
    scales = _scale(have[0], height), _scale(have[1], width)
    if all(abs(scale - round(scale)) < EPSILON for scale in scales):
        return _whole(image, round(scales[0]), round(scales[1]))
    return _parts(image, height, width)


def _scale(have: int, wanted: int) -> float:
    """Return OpenCV's ratio, whose last bit decides which pixel an area begins in."""
    return 1.0 / (wanted / have)


def _whole(image: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """Return the mean of every `rows` x `columns` pixels."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    sums = image.reshape(height, rows, width, columns, 3).sum((1, 3), dtype=np.int64)
    if rows == columns == 2:
        return ((sums + 2) >> 2).astype(np.uint8)
    return np.rint(sums.astype(np.float32) * np.float32(1.0 / (rows * columns))).astype(np.uint8)


def _parts(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return means of areas whose edges cut pixels."""
    rows = _weighted(image.astype(np.float32), width, 1)
    return np.rint(_weighted(rows, height, 0)).clip(0, 255).astype(np.uint8)


def _weighted(values: NDArray[np.float32], wanted: int, axis: int) -> NDArray[np.float32]:
    places, weights = _areas(values.shape[axis], wanted)
    shape = (1, -1, 1) if axis else (-1, 1, 1)
    total: Any = np.float32(0)
    for place, weight in zip(places, weights, strict=True):  # one pixel of every area at a time
        total = total + values.take(place, axis) * weight.reshape(shape)
    return total


@cache
def _areas(have: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the pixels of each area in their order and how much they weigh, both [most, wanted]."""
    scale = _scale(have, wanted)
    every: list[list[tuple[int, float]]] = []
    for number in range(wanted):
        begin = number * scale
        end, width = begin + scale, min(scale, have - begin)
        last = min(int(np.floor(end)), have - 1)
        first = min(int(np.ceil(begin)), last)
        parts = [(first - 1, (first - begin) / width)] if first - begin > LEAST else []
        parts += [(pixel, 1.0 / width) for pixel in range(first, last)]
        if end - last > LEAST:
            parts.append((last, min(end - last, 1.0, width) / width))
        every.append(parts)
    most = max(map(len, every))
    places, weights = np.zeros((most, wanted), np.int64), np.zeros((most, wanted), np.float32)
    for number, parts in enumerate(every):
        for at, (pixel, weight) in enumerate(parts):
            places[at, number], weights[at, number] = pixel, weight
    return places, weights


def _linear(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return an enlarged image: whole-number weights, whose rounding is that of VResizeLinear."""
    left, first, second = _steps(image.shape[1], width)
    right = np.minimum(left + 1, image.shape[1] - 1)
    values = image.astype(np.int64)
    rows = values[:, left] * first[:, None] + values[:, right] * second[:, None]
    top, first, second = _steps(image.shape[0], height)
    bottom = np.minimum(top + 1, image.shape[0] - 1)
    upper, lower = (
        (rows[at] >> 4) * weight[:, None, None] >> 16 for at, weight in ((top, first), (bottom, second))
    )
    return ((upper + lower + 2) >> 2).clip(0, 255).astype(np.uint8)


@cache
def _steps(have: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixel before each new one, and what it and the next one weigh."""
    scale, inverse = _scale(have, wanted), wanted / have
    number = np.arange(wanted)
    at = np.floor(number * scale).astype(np.int64)
    part = ((number + 1) - (at + 1) * inverse).astype(np.float32)
    part = np.where(part <= 0, np.float32(0), part - np.floor(part))
    beyond = at >= have - 1
    part, at = np.where(beyond, np.float32(0), part), np.where(beyond, have - 1, at)
    second = np.rint(part * np.float32(COEFFICIENTS)).astype(np.int64)
    first = np.rint((np.float32(1) - part) * np.float32(COEFFICIENTS)).astype(np.int64)
    return at, first, second
