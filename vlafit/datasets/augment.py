"""Augmentation of training samples, before the codec; every draw depends on (seed, epoch, sample) only."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError
from vlafit.types import Observation, Sample

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
    """Return (dy, dx) of each camera, int [n, 2] in -pixels..pixels, from (seed, epoch, index) only."""
    if pixels < 0:
        raise DataError(f"images shift by 0 or more pixels, not {pixels}")
    generator = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, epoch, index]))
    return generator.integers(-pixels, pixels, size=(cameras, 2), endpoint=True)


def shift_images(sample: Sample, pixels: int, *, seed: int, epoch: int, index: int) -> Sample:
    """Return `sample` with each camera's images shifted by one draw of its own, by up to `pixels`.

    A camera's earlier frames, if there is a history, move with the present one. `index` is the sample's
    position in its dataset. Raises DataError for a negative number of pixels.
    """
    names = sorted(sample.observation.images)
    draws = draw_shifts(seed, epoch, index, len(names), pixels).tolist()
    shifts = dict(zip(names, draws, strict=True))
    observation = sample.observation
    past = tuple(_shifted(earlier, shifts) for earlier in observation.past)
    return replace(sample, observation=replace(_shifted(observation, shifts), past=past))


def _shifted(observation: Observation, shifts: Mapping[str, Sequence[int]]) -> Observation:
    moved = {name: shift_image(image, *shifts[name]) for name, image in observation.images.items()}
    return replace(observation, images=moved)
