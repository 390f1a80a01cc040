"""Interval of a mean over episodes, each of which counts once however many observations it holds.

Neighbouring observations of an episode are alike, so they are no independent evidence; episodes are.
Student's quantile over the episodes' means is exact for normal means and wide for few episodes, where a
percentile bootstrap over episodes would be too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit


@dataclass(frozen=True)
class Mean:
    """A mean over episodes with its 95 % interval; None where one episode says nothing about others."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_interval(
    by_episode: Sequence[float] | NDArray[np.float64],
    confidence: float = 0.95,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Mean:
    """Return the mean of the episodes' values and its interval. Raises ValueError without episodes.

    `within` are the least and largest value that there can be; the interval ends there.
    """
    values = np.asarray(by_episode, np.float64)
    if not values.size:
        raise ValueError("no episodes to take a mean over")
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Mean(mean, None, None)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    half = float(stdtrit(count - 1, 1 - (1 - confidence) / 2)) * error
    least, largest = within
    return Mean(mean, max(mean - half, least), min(mean + half, largest))
