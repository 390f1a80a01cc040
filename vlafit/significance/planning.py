"""Number of starts, or of independent episodes, that a difference of success needs to be shown.

The starts are those at which the exact test itself (`sign_flip_p`) has the power, at starts like those
already played: the share of starts at which the two sides differ, and by how much under the training seeds,
is taken as observed. The normal approximation promises 80 % where the test of counts has 64 to 78 %.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from vlafit.significance.paired import Pairs

POWER = 0.8  # probability of showing a real difference: the usual convention (Cohen, 1988)
DRAWS = 2000  # simulated evaluations with several seeds: a power of 0.8 has a standard error of 0.9 points
MOST_EXACT = 50_000  # starts that differ; above, the normal approximation, which is at most 0.2 % lower
MOST_DRAWN = 2000  # starts that are drawn one by one; above, how many have each sum is drawn
MANY_DRAWS = 20_000  # of how many starts have each sum: a power of 0.8 has a standard error of 0.3 points
MOST_SUMMED = 1000  # the sum of all sizes, up to which the exact p is computed of drawn numbers of starts


def starts_needed(pairs: Pairs, *, alpha: float = 0.05, power: float = POWER) -> int | None:
    """Return the shared starts at which the exact test shows the observed difference with this power.

    It is the smallest number from which on the power is never below. With one training seed the power is
    exact; with several it is simulated from the observed sums by start, always with the same random numbers,
    at a cost that does not grow with the starts.
    None where there is no difference. Pass alpha divided by the number of comparisons for several pairs.
    """
    sums = pairs.by_start
    if not sums.any() or not sums.sum():
        return None
    normal = _normal(float(sums.var()), float(sums.mean()), alpha, power)
    if np.abs(sums).max() > 1:
        simulate = _of_several_seeds if normal <= MOST_DRAWN else _of_many_starts
        return simulate(sums, normal, alpha, power)
    wins, losses = float((sums > 0).mean()), float((sums < 0).mean())
    if normal * (wins + losses) > MOST_EXACT:
        return normal
    return _of_one_seed(max(wins, losses), min(wins, losses), normal, alpha, power)


def independent_episodes_needed(
    first: float, second: float, *, alpha: float = 0.05, power: float = POWER
) -> int:
    """Return the episodes of each strategy if both had starts of their own: rates `first` and `second`.

    Normal approximation, of the test of two proportions with a variance for each; an exact test takes more.
    """
    return _normal(first * (1 - first) + second * (1 - second), first - second, alpha, power)


def _normal(variance: float, difference: float, alpha: float, power: float) -> int:
    quantiles = float(ndtri(1 - alpha / 2) + ndtri(power))
    return max(2, math.ceil(variance * (quantiles / difference) ** 2))


def _of_one_seed(wins: float, losses: float, near: int, alpha: float, power: float) -> int:
    """Return the starts for McNemar's exact test: `wins` and `losses` are probabilities at a start."""
    differ = wins + losses

    def averaged(rejected: NDArray[np.float64], starts: int) -> float:
        """Return the mean of `rejected`, given by the number of starts that differ, over that number."""
        low, high = (int(binom.ppf(tail, starts, differ)) for tail in (1e-12, 1 - 1e-12))
        counts = np.arange(low, high + 1)
        return float(binom.pmf(counts, starts, differ) @ rejected[counts])

    most = 2 * near + round(8 / differ) + 64
    rejected = _rejected(int(binom.ppf(1 - 1e-12, most, differ)), wins / differ, alpha)
    # More starts differ at more starts, so this lower bound of the power only grows with the starts, while
    # the power itself moves up and down.
    never_below = np.minimum.accumulate(rejected[::-1])[::-1]
    needed = _smallest(lambda starts: averaged(never_below, starts) >= power, most)
    for step in (max(1, needed // 2000), 1):
        while needed - step > 1 and averaged(rejected, needed - step) >= power:
            needed -= step
    return needed


def _rejected(most: int, share: float, alpha: float) -> NDArray[np.float64]:
    """Return the probability that the exact test rejects, for 0 to `most` starts that differ.

    `share` of them are won by the better side.
    """
    counts = np.arange(most + 1)
    critical = binom.ppf(alpha / 2, counts, 0.5)  # the smallest count with a tail of at least alpha / 2
    critical = np.where(binom.cdf(critical, counts, 0.5) <= alpha / 2, critical, critical - 1)
    return binom.cdf(critical, counts, share) + binom.sf(counts - critical - 1, counts, share)


def _of_several_seeds(sums: NDArray[np.int64], near: int, alpha: float, power: float) -> int:
    """Return the starts for the exact test of sums over seeds, drawn from those observed."""
    most = 2 * near + 64
    drawn = np.random.default_rng(0).choice(sums, size=(DRAWS, most))

    def enough(starts: int) -> bool:
        return float((sign_flip_ps(drawn[:, :starts]) <= alpha).mean()) >= power

    return _smallest(enough, most)


def _of_many_starts(sums: NDArray[np.int64], near: int, alpha: float, power: float) -> int:
    """Return the starts as `_of_several_seeds`, of drawn numbers of starts with each sum.

    The power at `near`, or where all starts differ the same way, is not far from the one that is wanted.
    """
    values, found = np.unique(sums, return_counts=True)
    is_exact = near * np.abs(sums).mean() <= MOST_SUMMED

    def enough(starts: int) -> bool:
        rng = np.random.default_rng(0)
        counts = rng.multinomial(starts, found / found.sum(), DRAWS if is_exact else MANY_DRAWS)
        ps = counted_ps(values, counts) if is_exact else normal_ps(values, counts)
        return float((ps <= alpha).mean()) >= power

    return _smallest(enough, 2 * near, near // 2)


def counted_ps(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `sign_flip_p` of each row of `counts`: how many starts have each of the sums `values`."""
    differing, places = np.unique(counts[:, values != 0], axis=0, return_inverse=True)
    rows = np.zeros((len(differing), int(differing.sum(axis=1).max(initial=0))), np.int64)
    for row, some in zip(rows, differing, strict=True):
        row[: some.sum()] = np.repeat(values[values != 0], some)
    return sign_flip_ps(rows)[places.ravel()]


def normal_ps(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `counted_ps` by the normal distribution of the sum under flipped signs.

    The sum moves in steps of twice the greatest common divisor of all sizes, of which half is the continuity
    correction.
    """
    step = np.gcd.reduce(np.abs(values))
    sizes, squares = np.abs(counts @ values), counts @ values**2
    return np.minimum(1.0, 2 * ndtr(-(sizes - step) / np.sqrt(np.maximum(squares, 1))))


def sign_flip_ps(by_start: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `sign_flip_p` of each row.

    The sum's distribution is the inverse Fourier transform of a product of cosines, one for each start.
    """
    sizes = np.abs(by_start)
    length = 2 * int(sizes.sum(axis=1).max()) + 2
    frequencies = 2 * np.pi * np.arange(length // 2 + 1) / length
    transform = np.ones((len(sizes), len(frequencies)))
    for size in range(1, int(sizes.max(initial=0)) + 1):
        transform *= np.cos(size * frequencies) ** (sizes == size).sum(axis=1, keepdims=True)
    chances = np.fft.irfft(transform, length, axis=1)  # of each sum, negative ones from the end
    distance = np.minimum(np.arange(length), length - np.arange(length))
    observed = np.abs(by_start.sum(axis=1, keepdims=True))
    return np.minimum(1.0, (chances * (distance >= observed)).sum(axis=1))


def _smallest(holds: Callable[[int], bool], high: int, low: int = 1) -> int:
    """Return the smallest number above `low`, up to `high`, for which `holds`: false before, true after."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
