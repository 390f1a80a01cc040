"""The statistics of comparisons against robostats 0.2.0, scipy, and enumeration of all cases.

robostats has McNemar's test, Tango's interval, Holm's correction and the set of the best policies. It has
nothing for several training seeds at a start, for planning or for sequential stopping: those are checked here
by enumeration and against scipy, and by simulation in `test_error_rates.py`.
"""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from vlafit.significance import (
    Pairs,
    anytime_p,
    best_set,
    first_rejection,
    holm,
    paired_interval,
    sign_flip_p,
    two_way_interval,
)
from vlafit.significance.paired import design_effect

robostats = pytest.importorskip("robostats")


def pairs_of(wins: int, losses: int, both: int, neither: int) -> Pairs:
    """Return one seed's outcomes with these counts."""
    first = [1.0] * wins + [0.0] * losses + [1.0] * both + [0.0] * neither
    second = [0.0] * wins + [1.0] * losses + [1.0] * both + [0.0] * neither
    return Pairs(np.array([first]), np.array([second]))


def record_set(policy: str, outcomes: np.ndarray) -> object:
    return robostats.RecordSet(
        robostats.EpisodeRecord(policy, "task", bool(success), scenario_id=f"{start:04d}")
        for start, success in enumerate(outcomes)
    )


@pytest.mark.parametrize(("wins", "losses"), [(w, n) for w in range(7) for n in range(7) if w + n])
def test_with_one_seed_the_exact_test_is_mcnemars(wins: int, losses: int) -> None:
    pairs = pairs_of(wins, losses, 3, 2)
    table = robostats.pair(record_set("a", pairs.first[0]), record_set("b", pairs.second[0]))
    p = sign_flip_p(pairs.by_start)
    assert p == pytest.approx(robostats.mcnemar(table).p_value, abs=1e-12)
    assert p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, abs=1e-12)


@pytest.mark.parametrize(
    "counts",
    [(5, 2, 30, 13), (0, 0, 20, 5), (9, 0, 1, 0), (3, 3, 3, 3), (0, 7, 40, 3), (1, 0, 0, 9), (12, 0, 0, 0)],
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_with_one_seed_the_interval_is_tangos(counts: tuple[int, int, int, int], confidence: float) -> None:
    pairs = pairs_of(*counts)
    table = robostats.pair(record_set("a", pairs.first[0]), record_set("b", pairs.second[0]))
    expected = robostats.paired_difference(table, confidence=confidence)
    assert paired_interval(pairs, confidence) == pytest.approx((expected.lower, expected.upper), abs=1e-6)


def test_holm_and_the_set_of_the_best_are_those_of_robostats() -> None:
    rng = np.random.default_rng(0)
    names, excluded = ["a", "b", "c", "d"], 0
    for _ in range(5):
        ease = rng.random(60)
        outcomes = [(ease + shift > rng.random(60)).astype(float) for shift in (0.35, 0.3, 0.0, -0.2)]
        alignment = robostats.align(*(record_set(n, o) for n, o in zip(names, outcomes, strict=True)))
        expected = robostats.indistinguishable_set(alignment)
        tested = expected.pairwise.pairs
        pairs = [Pairs(outcomes[t.index_a][None], outcomes[t.index_b][None]) for t in tested]
        adjusted = holm([sign_flip_p(pair.by_start) for pair in pairs])
        assert adjusted == pytest.approx([t.p_value_corrected for t in tested], abs=1e-12)
        better = [
            (names[t.index_a], names[t.index_b]) if pair.mean > 0 else (names[t.index_b], names[t.index_a])
            for t, pair, p in zip(tested, pairs, adjusted, strict=True)
            if p <= 0.05
        ]
        assert best_set(names, better) == tuple(names[i] for i in expected.members)
        excluded += len(names) - len(expected.members)
    assert excluded > 0, "a case in which nothing is excluded shows nothing"


@pytest.mark.parametrize(
    "by_start", [[3, -1, 2, 1], [1, 1, -2, 3, 3, -1], [0, 0], [2], [-3, -3, -3, 1, 0, 2]]
)
def test_with_several_seeds_the_exact_test_counts_all_signs(by_start: list[int]) -> None:
    sums = [
        sum(s * v for s, v in zip(signs, by_start, strict=True))
        for signs in product((1, -1), repeat=len(by_start))
    ]
    expected = np.mean([abs(value) >= abs(sum(by_start)) for value in sums])
    assert sign_flip_p(by_start) == pytest.approx(expected, abs=1e-12)


def test_identical_seeds_add_no_information() -> None:
    one = pairs_of(8, 2, 30, 10)
    three = Pairs(np.repeat(one.first, 3, axis=0), np.repeat(one.second, 3, axis=0))
    assert three.mean == one.mean and design_effect(three) == pytest.approx(3)
    assert sign_flip_p(three.by_start) == pytest.approx(sign_flip_p(one.by_start))
    narrow, wide = paired_interval(one), paired_interval(three)
    assert wide[0] < narrow[0] < narrow[1] < wide[1], "the same counts, with Student's quantile"
    assert wide == pytest.approx(narrow, abs=0.01)


def test_errors_remove_a_pair_and_not_a_start() -> None:
    first = [{"a": True, "b": None, "c": True}, {"a": False, "b": True, "c": None}]
    second = [{"a": False, "b": False, "c": None}, {"a": False, "b": False, "c": True}]
    pairs = Pairs.of(first, second)
    assert pairs.starts == 2 and pairs.by_start.tolist() == [1, 1]
    assert pairs.mean == pytest.approx(2 / 3)
    assert two_way_interval(pairs) is None and paired_interval(pairs)[0] < 2 / 3
    assert Pairs.of([{"a": True}], [{"b": True}]).starts == 0
    assert paired_interval(Pairs.of([{"a": True}], [{"b": True}])) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="1 training seeds.* 2"):
        Pairs.of(first[:1], second)


def test_the_two_way_interval_is_that_of_a_paired_t_test_over_seeds_if_only_seeds_vary() -> None:
    first = np.array([[1.0] * 10, [1.0] * 10, [0.0] * 10])
    second = np.array([[0.0] * 10, [1.0] * 10, [0.0] * 10])
    test = stats.ttest_1samp([1.0, 0.0, 0.0], 0.0).confidence_interval(0.95)
    expected = (max(-1.0, test.low), min(1.0, test.high))
    assert two_way_interval(Pairs(first, second)) == pytest.approx(expected, abs=1e-9)


def test_the_sequential_test_is_the_mixture_of_binomial_likelihoods() -> None:
    grid = np.linspace(0, 1, 200_001)[1:-1]
    prior = stats.beta.pdf(grid, 0.5, 0.5)
    for signs in ([1] * 9, [1, 1, -1, 1, 1, 1, 1, 0, 1, 1, 1, 1], [1, -1] * 5):
        highest = 1.0
        for count in range(1, len(signs) + 1):
            wins, losses = (sum(s == side for s in signs[:count]) for side in (1, -1))
            ratio = np.trapezoid(prior * (2 * grid) ** wins * (2 * (1 - grid)) ** losses, grid)
            highest = max(highest, float(ratio))
        assert anytime_p(signs) == pytest.approx(1 / highest, rel=1e-2)
    assert first_rejection([1] * 20) == 7 and first_rejection([1, -1] * 50) is None
    assert anytime_p([]) == 1.0 and anytime_p([0] * 10) == 1.0
