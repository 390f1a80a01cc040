"""Augmentation of training samples, before the codec; every draw belongs to (seed, epoch, sample)."""

import functools
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
    return image.take(_source(height, dy), axis=0).take(_source(width, dx), axis=1)


@functools.lru_cache(maxsize=256)
def _source(length: int, by: int) -> NDArray[np.int64]:
    return np.clip(np.arange(length) - by, 0, length - 1)


def draw_shifts(seed: int, epoch: int, index: int, cameras: int, pixels: int) -> NDArray[np.int64]:
    """Return (dy, dx) of each camera, int [n, 2] in -pixels..pixels, from (seed, epoch, index) alone."""
    if pixels < 0:
        raise DataError(f"images shift by 0 or more pixels, not {pixels}")
    generator = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, epoch, index]))
    return generator.integers(-pixels, pixels, size=(cameras, 2), endpoint=True)


def shift_images(sample: Sample, pixels: int, *, seed: int, epoch: int, index: int) -> Sample:
    """Return `sample` with each camera's image shifted by a draw of its own, by up to `pixels`.

    `index` is the sample's position in its dataset. Raises DataError for a negative number of pixels.
    """
    images = sample.observation.images
    shifts = draw_shifts(seed, epoch, index, len(images), pixels).tolist()
    moved = {
        name: shift_image(images[name], dy, dx) for name, (dy, dx) in zip(sorted(images), shifts, strict=True)
    }
    return replace(sample, observation=replace(sample.observation, images=moved))
