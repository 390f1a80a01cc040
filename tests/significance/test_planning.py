"""The starts that a difference needs, against the power of the test itself: enumerated, or simulated."""

import numpy as np
import pytest
from scipy import stats

from vlafit.significance import Pairs, independent_episodes_needed, sign_flip_p, starts_needed
from vlafit.significance.planning import counted_ps, normal_ps

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


def test_rare_wins_need_the_starts_at_which_six_of_them_are_seen() -> None:
    """Six wins of six are the fewest that the exact test rejects: 2 / 64 is below 0.05, 2 / 32 is not."""
    needed, share = starts_needed(pairs_of(1, 0, 19_999)), 1 / 20_000
    assert needed
    assert stats.binom.sf(5, needed, share) >= 0.8 > stats.binom.sf(5, needed - 1, share)


@pytest.mark.parametrize(
    "sums",
    [[0] * 300 + [1] * 40 + [-1] * 36 + [2] * 10 + [-2] * 9, [0] * 3000 + [2] * 3 + [-1]],
    ids=["half differ", "few differ"],
)
def test_with_several_seeds_many_starts_have_the_power_too(sums: list[int]) -> None:
    first = np.array([[max(0, one) for one in sums], [max(0, one - 1) for one in sums]]).clip(0, 1)
    second = np.array([[max(0, -one) for one in sums], [max(0, -one - 1) for one in sums]]).clip(0, 1)
    pairs = Pairs(first.astype(float), second.astype(float))
    assert pairs.by_start.tolist() == sums
    needed = starts_needed(pairs)
    assert needed and needed > 2000
    values, found = np.unique(sums, return_counts=True)
    counts = np.random.default_rng(1).multinomial(needed, found / len(sums), RUNS)
    p_of = counted_ps if np.abs(sums).mean() < 0.01 else normal_ps  # the next test compares the two
    assert abs((p_of(values, counts) <= 0.05).mean() - 0.8) < 2 * SPREAD, "the search has draws of its own"


def test_the_normal_distribution_of_many_flipped_sums_is_close_to_the_exact_one() -> None:
    """At 750 differing starts and more the fourth cumulant moves a p below 0.1 by less than 1e-4."""
    values = np.arange(-2, 3)
    counts = np.random.default_rng(3).multinomial(1500, (0.15, 0.1, 0.5, 0.1, 0.15), 200)
    exact, normal = counted_ps(values, counts), normal_ps(values, counts)
    assert np.abs(exact - normal)[exact < 0.1].max() < 1e-4
    rows = [np.repeat(values, some) for some in counts[:3]]
    assert np.allclose(exact[:3], [sign_flip_p(row) for row in rows], atol=1e-9)


def test_no_difference_needs_no_number() -> None:
    assert starts_needed(pairs_of(3, 3, 4)) is None
    assert starts_needed(pairs_of(0, 0, 4)) is None


def test_episodes_without_shared_starts_agree_with_statsmodels() -> None:
    # statsmodels.stats.power: NormalIndPower with unpooled variances gives 1485.6 for these rates
    assert independent_episodes_needed(125 / 150, 119 / 150) == 1486
    needed = starts_needed(pairs_of(16, 4, 80))
    assert needed and needed < 0.6 * independent_episodes_needed(0.76, 0.64)
