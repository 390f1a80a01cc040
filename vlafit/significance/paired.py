"""Compare two strategies whose policies were evaluated from the same starts.

A start (task and environment seed) is one cluster: its episodes under several training seeds are not
independent, because an easy start is easy for every policy. So all inference here is over starts.

- `sign_flip_p`: exact test. If both strategies are alike, swapping their outcomes at a start changes nothing,
  so both signs of a start's difference are equally likely. With one seed this is McNemar's exact test.
- `paired_interval`: Tango's score interval for a difference of paired proportions (Statistics in Medicine
  17, 1998), with the sample size divided by the clusters' design effect (Rao and Scott, Biometrics 48, 1992).
- `paired_t_p`: Student's test of paired differences, for what is not an outcome (losses by training seed).
- `two_way_interval`: also counts the variation between training runs (crossed random effects with
  Satterthwaite's degrees of freedom). It is wide, because a few training runs tell little about new ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

Outcomes = Mapping[str, bool | None]
"""Start -> success; None for an environment error."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Outcomes of two strategies at shared starts.

    `first` and `second` are float [seeds, starts]: 1 success, 0 failure, NaN if either side has no outcome.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]

    @classmethod
    def of(cls, first: Sequence[Outcomes], second: Sequence[Outcomes]) -> "Pairs":
        """Pair the outcomes of two strategies: one mapping per training seed, both in the same order.

        Starts are those with an outcome on both sides under at least one seed, in the first side's order.
        Raises ValueError for different numbers of seeds.
        """
        if len(first) != len(second):
            raise ValueError(f"{len(first)} training seeds on one side, {len(second)} on the other")
        starts = list(dict.fromkeys(start for outcomes in first for start in outcomes))
        tables = np.full((2, len(first), len(starts)), np.nan)
        for seed, sides in enumerate(zip(first, second, strict=True)):
            for column, start in enumerate(starts):
                values = [outcomes.get(start) for outcomes in sides]
                if None not in values:
                    tables[:, seed, column] = values
        shared = ~np.isnan(tables[0]).all(axis=0)
        return cls(tables[0][:, shared], tables[1][:, shared])

    @property
    def difference(self) -> NDArray[np.float64]:
        """First minus second, [seeds, starts]."""
        return self.first - self.second

    @property
    def starts(self) -> int:
        """Number of starts that both sides played."""
        return self.first.shape[1]

    @property
    def by_start(self) -> NDArray[np.int64]:
        """Sum of the differences over seeds, for each start."""
        return np.nansum(self.difference, axis=0).astype(np.int64)

    @property
    def mean(self) -> float:
        """Mean difference of success over all pairs of episodes; NaN without any."""
        pairs = self.difference[~np.isnan(self.difference)]
        return float(pairs.mean()) if pairs.size else math.nan


def sign_flip_p(by_start: Sequence[int] | NDArray[np.int64]) -> float:
    """Return the exact two-sided p-value of the differences summed by start.

    The distribution of their sum over all assignments of signs is computed by convolution. If all are -1, 0
    or 1, this is McNemar's exact test.
    """
    sizes = np.abs(np.asarray(by_start, np.int64))
    sizes = sizes[sizes > 0]
    observed = abs(int(np.sum(by_start)))
    total = int(sizes.sum())
    if not total:
        return 1.0
    probability = np.zeros(2 * total + 1)  # of each sum from -total to total
    probability[total] = 1.0
    for size in sizes:
        probability = 0.5 * (np.roll(probability, size) + np.roll(probability, -size))
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(probability[sums >= observed].sum()))


def design_effect(pairs: Pairs) -> float:
    """Return the variance of the mean difference relative to independent pairs, from 1 to the seeds."""
    difference = pairs.difference
    valid = ~np.isnan(difference)
    counts = valid.sum(axis=0)
    size, seeds = int(counts.sum()), int(counts.max(initial=1))
    residual = np.where(valid, np.nan_to_num(difference) - pairs.mean, 0.0)
    independent = float((residual**2).sum())
    if independent < 1e-12 * size:
        return float(seeds)  # all differences are equal: nothing shows that seeds add information
    clustered = float((residual.sum(axis=0) ** 2).sum())
    return min(max(1.0, clustered / independent), float(seeds))


def paired_interval(pairs: Pairs, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean difference over new starts, for these training runs.

    With one training seed it is Tango's interval; with several, the quantile is Student's over the starts.
    Returns (-1, 1) without pairs.
    """
    difference = pairs.difference
    size = int((~np.isnan(difference)).sum())
    if not size:
        return -1.0, 1.0
    wins, losses = int((difference == 1).sum()), int((difference == -1).sum())
    several = bool(((~np.isnan(difference)).sum(axis=0) > 1).any())
    effect = design_effect(pairs)
    tail = 1 - (1 - confidence) / 2
    quantile = float(stdtrit(max(1, pairs.starts - 1), tail) if several else ndtri(tail))
    return tango(wins / effect, losses / effect, size / effect, quantile)


def tango(wins: float, losses: float, size: float, quantile: float) -> tuple[float, float]:
    """Return Tango's score interval of (wins - losses) / size; the counts need not be integers."""
    estimate = (wins - losses) / size

    def score(delta: float) -> float:
        """Score statistic of the hypothesis that the difference is `delta`."""
        b = -wins - losses + (2 * size - wins + losses) * delta
        c = -losses * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 8 * size * c, 0.0)) - b) / (4 * size)  # of losses, most likely
        share = min(max(share, 0.0, -delta), (1 - delta) / 2)
        variance = size * (2 * share + delta * (1 - delta))
        distance = wins - losses - size * delta
        if abs(distance) < 1e-12 * size:
            return 0.0
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    edge = 1e-12
    low, high = -1.0, 1.0
    if estimate > -1 and score(-1 + edge) > quantile:
        low = _crossing(lambda delta: score(delta) > quantile, -1 + edge, estimate)
    if estimate < 1 and score(1 - edge) < -quantile:
        high = _crossing(lambda delta: score(delta) > -quantile, estimate, 1 - edge)
    return low, high


def _crossing(above: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `above`, true at `low` and false at `high`, changes; by bisection to 1e-15."""
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return (low + high) / 2


def two_way_interval(pairs: Pairs, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the interval of the mean difference over new starts and new training runs.

    None with fewer than two seeds or starts, or if the outcome of a pair of episodes is missing.
    """
    d = pairs.difference
    seeds, starts = d.shape
    if seeds < 2 or starts < 2 or np.isnan(d).any():
        return None
    mean = d.mean()
    of_seed, of_start = d.mean(axis=1, keepdims=True), d.mean(axis=0, keepdims=True)
    by_seed = starts * float(((of_seed - mean) ** 2).sum()) / (seeds - 1)
    by_start = seeds * float(((of_start - mean) ** 2).sum()) / (starts - 1)
    rest = float(((d - of_seed - of_start + mean) ** 2).sum()) / ((seeds - 1) * (starts - 1))
    total = max(by_seed + by_start - rest, by_seed, by_start)
    if total <= 0:
        return float(mean), float(mean)
    spread = by_seed**2 / (seeds - 1) + by_start**2 / (starts - 1) + rest**2 / ((seeds - 1) * (starts - 1))
    freedom = max(1.0, total**2 / spread)
    half = float(stdtrit(freedom, 1 - (1 - confidence) / 2)) * math.sqrt(total / (seeds * starts))
    return max(-1.0, float(mean) - half), min(1.0, float(mean) + half)


def paired_t_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's test that paired differences are 0 in the mean.

    1 for fewer than two, of which nobody knows how much they vary.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    values = np.asarray(differences, np.float64)
    middle, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return 0.0 if middle else 1.0
    return float(2 * stdtr(n - 1, -abs(middle) / error))
