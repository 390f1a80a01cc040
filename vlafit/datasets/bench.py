"""Measure how fast a dataset is read here, and say which number of loader processes suits it."""

import os
import time
from dataclasses import dataclass

import numpy as np

from vlafit.datasets.store import EpisodeStore

HANDOVER_S = 5.6e-4  # a spawned worker adds this to a sample: 1,787 samples/s of tiny frames, 2 cores
ENOUGH = 4  # more workers rarely pay on one disk


@dataclass(frozen=True)
class Bench:
    """The cost of reading samples in this process."""

    samples: int
    seconds: float
    image_seconds: float
    """Of these, for frames."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """The step that takes most of the time."""
        return "frames" if self.image_seconds > self.seconds / 2 else "columns"

    def workers(self, cores: int) -> int:
        """Return the data.workers that suits: 0 where handing a sample over costs more than reading it."""
        if self.seconds / max(1, self.samples) < HANDOVER_S:
            return 0
        return max(1, min(cores - 1, ENOUGH))


def measure(store: EpisodeStore, seconds: float, chunk: int = 50, seed: int = 0) -> Bench:
    """Read samples at random for about `seconds`, after a few to warm up."""
    rng = np.random.default_rng(seed)
    cameras = [camera.name for camera in store.embodiment.cameras]

    def place() -> tuple[int, int]:
        episode = int(rng.integers(len(store.episodes)))
        return episode, int(rng.integers(store.episodes[episode].length))

    for _ in range(10):
        store.sample(*place(), chunk)
    samples, total, images = 0, 0.0, 0.0
    while total < seconds:
        episode, step = place()
        start = time.perf_counter()
        store.sample(episode, step, chunk)
        total += time.perf_counter() - start
        start = time.perf_counter()
        for camera in cameras:
            store.image(episode, step, camera)
        images += time.perf_counter() - start
        samples += 1
    return Bench(samples, total, min(images, total))


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
