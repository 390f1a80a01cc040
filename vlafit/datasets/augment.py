"""Augmentation of training samples, before the codec; every draw belongs to (seed, epoch, sample)."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError
from vlafit.types import Sample

STREAM = 0x5348494654  # "SHIFT": keeps these draws apart from others that use the same seed


def shift_image(image: NDArray[np.uint8], dy: int, dx: int) -> NDArray[np.uint8]:
    """Return `image` [h, w, c] moved down by `dy` and right by `dx` pixels, edge pixels repeated."""
    if dy == 0 and dx == 0:
        return image
    height, width = image.shape[:2]
    dy, dx = max(-height, min(height, dy)), max(-width, min(width, dx))
    shifted = np.empty_like(image, order="C")
    top, bottom = max(dy, 0), height + min(dy, 0)
    left, right = max(dx, 0), width + min(dx, 0)
    shifted[top:bottom, left:right] = image[top - dy : bottom - dy, left - dx : right - dx]
    if right > left:
        shifted[top:bottom, :left] = shifted[top:bottom, left : left + 1]
        shifted[top:bottom, right:] = shifted[top:bottom, right - 1 : right]
    else:  # moved out of sight: the nearest column is left
        shifted[top:bottom] = image[top - dy : bottom - dy, (0 if dx > 0 else -1), None]
    if bottom > top:
        shifted[:top] = shifted[top : top + 1]
        shifted[bottom:] = shifted[bottom - 1 : bottom]
    else:
        columns = np.clip(np.arange(width) - dx, 0, width - 1)
        shifted[:] = image[0 if dy > 0 else -1, columns]
    return shifted


def draw_shifts(seed: int, epoch: int, index: int, cameras: int, pixels: int) -> NDArray[np.int64]:
    """Return (dy, dx) of each camera, int [n, 2] in -pixels..pixels, from (seed, epoch, index) alone."""
    if pixels < 0:
        raise DataError(f"images shift by 0 or more pixels, not {pixels}")
    generator = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, epoch, index]))
    return generator.integers(-pixels, pixels, size=(cameras, 2), endpoint=True)


def augment(sample: Sample, seed: int, epoch: int, index: int, pixels: int) -> Sample:
    """Return `sample` with each camera's image shifted by a draw of its own; `index` is its position."""
    if pixels == 0:
        return sample
    images = sample.observation.images
    shifts = draw_shifts(seed, epoch, index, len(images), pixels).tolist()
    moved = {
        name: shift_image(images[name], dy, dx) for name, (dy, dx) in zip(sorted(images), shifts, strict=True)
    }
    return replace(sample, observation=replace(sample.observation, images=moved))
