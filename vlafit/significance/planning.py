"""Number of starts, or of independent episodes, that a difference of success needs to be shown."""

import math

import numpy as np
from scipy.special import ndtri

from vlafit.significance.paired import Pairs

POWER = 0.8  # probability of showing a real difference: the usual convention (Cohen, 1988)


def starts_needed(pairs: Pairs, difference: float, *, alpha: float = 0.05, power: float = POWER) -> int:
    """Return the shared starts at which a test at level `alpha` shows `difference` with this power.

    The variance between starts is taken from `pairs`, with the same number of training seeds. Normal
    approximation; pass alpha divided by the number of comparisons for several pairs.
    """
    d = pairs.difference
    by_start = np.nanmean(d, axis=0)
    variance = float(np.var(by_start - by_start.mean() + difference, ddof=1))
    return _needed(variance, difference, alpha, power)


def independent_episodes_needed(
    first: float, second: float, *, alpha: float = 0.05, power: float = POWER
) -> int:
    """Return the episodes of each strategy if both had starts of their own: rates `first` and `second`."""
    return _needed(first * (1 - first) + second * (1 - second), first - second, alpha, power)


def _needed(variance: float, difference: float, alpha: float, power: float) -> int:
    quantiles = float(ndtri(1 - alpha / 2) + ndtri(power))
    return max(2, math.ceil(variance * (quantiles / difference) ** 2))
