"""Error rates by simulation: bounds are quantiles of the binomial distribution of the rejections.

Starts differ in difficulty, policies share it, and training seeds repeat it, as in an evaluation.
"""

import numpy as np
import pytest
from scipy import stats

from vlafit.significance import Pairs, anytime_p, first_rejection, holm, paired_interval, sign_flip_p

RUNS = 400
TAIL = 1e-5  # probability that a correct method misses a bound


def at_most(rate: float) -> int:
    """Return the rejections that a test with this error rate exceeds with probability TAIL."""
    return int(stats.binom.ppf(1 - TAIL, RUNS, rate))


def outcomes(rng: np.random.Generator, ease: np.ndarray, seeds: int, shift: float = 0.0) -> np.ndarray:
    """Return outcomes [seeds, starts] of a strategy that succeeds at each start with probability `ease`."""
    return (rng.random((seeds, len(ease))) < np.clip(ease + shift, 0, 1)).astype(float)


@pytest.mark.parametrize(("seeds", "starts"), [(1, 25), (3, 50)])
def test_two_equal_strategies_are_told_apart_in_at_most_5_per_cent(seeds: int, starts: int) -> None:
    rng = np.random.default_rng([seeds, starts])
    rejected = 0
    for _ in range(RUNS):
        ease = rng.beta(0.8, 0.4, starts)
        pairs = Pairs(outcomes(rng, ease, seeds), outcomes(rng, ease, seeds))
        rejected += sign_flip_p(pairs.by_start) <= 0.05
    assert 0 < rejected <= at_most(0.05)


@pytest.mark.slow
def test_among_five_equal_strategies_holm_keeps_the_error_of_the_family() -> None:
    rng = np.random.default_rng(2)
    any_rejected = any_uncorrected = 0
    for _ in range(RUNS):
        ease = rng.beta(1, 1, 30)
        arms = [outcomes(rng, ease, 2) for _ in range(5)]
        p = [sign_flip_p(Pairs(a, b).by_start) for i, a in enumerate(arms) for b in arms[:i]]
        any_rejected += min(holm(p)) <= 0.05
        any_uncorrected += min(p) <= 0.05
    assert any_rejected <= at_most(0.05)
    assert any_uncorrected > at_most(0.05), "without correction the bound would be missed"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_paired_interval_covers_the_true_difference(seeds: int) -> None:
    """Policies of one strategy share its strengths and weaknesses by start, so seeds are correlated."""
    rng = np.random.default_rng(seeds)
    missed = missed_as_independent = 0
    for _ in range(RUNS):
        ease = rng.beta(1, 1, 50)
        own = rng.random(50) < 0.5  # the second strategy fails at half of the starts, under every seed
        second = np.where(own, 0.0, ease)
        pairs = Pairs(outcomes(rng, ease, seeds), outcomes(rng, second, seeds))
        low, high = paired_interval(pairs)
        missed += not low <= 0.25 <= high
        flat = Pairs(pairs.first.reshape(1, -1), pairs.second.reshape(1, -1))
        low, high = paired_interval(flat)
        missed_as_independent += not low <= 0.25 <= high
    assert missed <= at_most(0.06)
    if seeds > 1:
        assert missed_as_independent > missed, "episodes of a start are not independent"


@pytest.mark.slow
def test_looking_after_every_start_keeps_the_error_of_the_sequential_test() -> None:
    rng = np.random.default_rng(3)
    stopped = peeked = 0
    for _ in range(RUNS):
        signs = rng.choice([-1, 0, 1], size=150, p=[0.2, 0.6, 0.2])
        stopped += first_rejection(map(int, signs)) is not None
        peeked += any(sign_flip_p(signs[:n]) <= 0.05 for n in range(15, 151, 15))
    assert stopped <= at_most(0.05)
    assert peeked > at_most(0.05), "the exact test, looked at 10 times, would miss the bound"


def test_a_real_difference_stops_the_sequential_test_early() -> None:
    rng = np.random.default_rng(4)
    stops = [first_rejection(map(int, rng.choice([-1, 0, 1], 200, p=[0.05, 0.65, 0.30]))) for _ in range(100)]
    known = [stop for stop in stops if stop is not None]
    assert len(known) >= 95 and np.median(known) < 80
    assert anytime_p([1] * 12) < 0.05
