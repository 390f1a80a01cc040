"""The starts that a difference needs, against the power of the test itself: enumerated, or simulated."""

import numpy as np
import pytest
from scipy import stats

from vlafit.significance import Pairs, independent_episodes_needed, sign_flip_p, starts_needed

RUNS = 1000
SPREAD = 4 * (0.8 * 0.2 / RUNS) ** 0.5  # of a simulated power of 0.8: four standard errors


def pairs_of(wins: int, losses: int, ties: int) -> Pairs:
    first = [1.0] * wins + [0.0] * losses + [1.0] * ties
    second = [0.0] * wins + [1.0] * losses + [1.0] * ties
    return Pairs(np.array([first]), np.array([second]))


def enumerated_power(starts: int, wins: float, losses: float) -> float:
    """Return the probability that McNemar's exact test rejects, over all outcomes of `starts` starts."""
    total = 0.0
    for discordant in range(starts + 1):
        of_these = np.arange(discordant + 1)
        p = 2 * stats.binom.cdf(np.minimum(of_these, discordant - of_these), discordant, 0.5)
        first = stats.binom.pmf(of_these, discordant, wins / (wins + losses))
        total += stats.binom.pmf(discordant, starts, wins + losses) * first[p <= 0.05].sum()
    return float(total)


@pytest.mark.parametrize("counts", [(4, 1, 5), (13, 1, 6), (9, 3, 12), (10, 0, 10), (2, 7, 3)])
def test_with_one_seed_it_is_the_smallest_number_from_which_the_exact_test_has_the_power(
    counts: tuple[int, int, int],
) -> None:
    wins, losses, _ = (count / sum(counts) for count in counts)
    needed = starts_needed(pairs_of(*counts))
    assert needed and needed > 2
    assert enumerated_power(needed - 1, wins, losses) < 0.8
    assert all(enumerated_power(n, wins, losses) >= 0.8 for n in range(needed, needed + 12))


def test_with_several_seeds_it_is_where_simulated_tests_have_the_power() -> None:
    rng = np.random.default_rng(5)
    ease = rng.uniform(0.2, 0.8, 40)
    one, other = ((rng.random((3, 40)) < ease + shift).astype(float) for shift in (0.18, 0.0))
    pairs = Pairs(one, other)
    needed = starts_needed(pairs)
    assert needed
    sums = rng.choice(pairs.by_start, size=(RUNS, needed))
    rejected = np.mean([sign_flip_p(row) <= 0.05 for row in sums])
    assert 0.8 - SPREAD < rejected < 0.8 + 2 * SPREAD, "the search has draws of its own"


def test_a_small_difference_needs_thousands_and_is_found_at_once() -> None:
    needed = starts_needed(pairs_of(105, 95, 800))
    assert needed
    normal = (0.2 - 0.01**2) * ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 0.01) ** 2
    assert normal < needed < 1.02 * normal, "the exact test costs about 1 / difference more"


def test_no_difference_needs_no_number() -> None:
    assert starts_needed(pairs_of(3, 3, 4)) is None
    assert starts_needed(pairs_of(0, 0, 4)) is None


def test_episodes_without_shared_starts_agree_with_statsmodels() -> None:
    # statsmodels.stats.power: NormalIndPower with unpooled variances gives 1485.6 for these rates
    assert independent_episodes_needed(125 / 150, 119 / 150) == 1486
    needed = starts_needed(pairs_of(16, 4, 80))
    assert needed and needed < 0.6 * independent_episodes_needed(0.76, 0.64)
