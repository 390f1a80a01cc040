"""The statistics that LeRobot keeps beside a dataset: of each episode, and of the whole."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
LEVELS = np.arange(256) / 255.0  # LeRobot keeps the statistics of images in 0..1

Stats = Mapping[str, NDArray]


def of_rows(rows: NDArray) -> Stats:
    """Return the statistics of rows [n, d], each an array [d]; quantiles are not of a histogram."""
    values = np.asarray(rows, np.float64)
    made: dict[str, NDArray] = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    }
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return made | dict(zip(QUANTILES, quantiles, strict=True))


class PixelCounts:
    """How often each level of each channel occurs, which gives exact statistics of any number of frames."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Count frames [n, h, w, 3]."""
        for channel in range(3):
            self.counts[channel] += np.bincount(frames[..., channel].ravel(), minlength=256)
        self.frames += len(frames)

    def merge(self, others: Iterable["PixelCounts"]) -> None:
        """Count the frames of others, too."""
        for other in others:
            self.counts += other.counts
            self.frames += other.frames

    def stats(self) -> Stats:
        """Return the statistics of all pixels, each an array [3, 1, 1], in 0..1."""
        total = self.counts.sum(axis=1)
        mean = self.counts @ LEVELS / total
        squares = (self.counts * (LEVELS - mean[:, None]) ** 2).sum(axis=1) / total
        made: dict[str, NDArray] = {"mean": mean, "std": np.sqrt(squares)}
        present = self.counts > 0
        made["min"] = LEVELS[present.argmax(axis=1)]
        made["max"] = LEVELS[255 - present[:, ::-1].argmax(axis=1)]
        below = self.counts.cumsum(axis=1)
        for name, share in QUANTILES.items():
            made[name] = np.array([_quantile(below[c], share) for c in range(3)])
        shaped = {name: made[name].reshape(3, 1, 1) for name in NAMES if name != "count"}
        return {**shaped, "count": np.array([self.frames])}


def _quantile(below: NDArray[np.int64], share: float) -> float:
    """Return a quantile, interpolated as numpy does, of levels of which `below` counts those up to each."""
    place = share * (int(below[-1]) - 1)
    lower = int(np.searchsorted(below, int(place), side="right"))
    upper = int(np.searchsorted(below, min(int(place) + 1, int(below[-1]) - 1), side="right"))
    return float(LEVELS[lower] + (LEVELS[upper] - LEVELS[lower]) * (place - int(place)))


def in_order(stats: Stats) -> dict[str, list]:
    """Return plain lists in LeRobot's order."""
    return {name: np.asarray(stats[name]).tolist() for name in NAMES}


def flat(features: Mapping[str, Stats], order: Sequence[str]) -> dict[str, list]:
    """Return columns of an episode's row: stats/FEATURE/STATISTIC."""
    return {
        f"stats/{key}/{name}": values for key in order for name, values in in_order(features[key]).items()
    }
