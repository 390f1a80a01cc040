"""A writer of the small dataset for each layout, and what every layout's store must do."""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from tests.datasets import droid_files, hdf5_writers, lerobot_files, npz_layout
from tests.datasets.layouts import Demo, card, robomimic_card, write_libero, write_robomimic
from vlafit.datasets import Card, EpisodeStore

Writer = Callable[[Path, list[Demo]], Card]


def libero(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything))


def robomimic(folder: Path, everything: list[Demo]) -> Card:
    return robomimic_card(write_robomimic(folder, everything))


def outside(folder: Path, everything: list[Demo]) -> Card:
    return npz_layout.write(folder, everything, card(folder))


WRITERS: dict[str, Writer] = {
    "droid": droid_files.write,
    "lerobot": lerobot_files.write,
    "libero": libero,
    "robomimic": robomimic,
    **hdf5_writers.WRITERS,
    npz_layout.__name__: outside,
}


def assert_read_in_a_spawned_worker(stores: list[EpisodeStore]) -> None:
    """Stores whose files are open here read the same images in a process that they were sent to."""
    here = [store.image(1, 2, "front").copy() for store in stores]  # opens files here first
    with get_context("spawn").Pool(1) as pool:
        there = pool.map(_read, stores)
    for expected, frame in zip(here, there, strict=True):
        np.testing.assert_array_equal(expected, frame)


def _read(store: EpisodeStore) -> np.ndarray:
    return store.image(1, 2, "front").copy()
