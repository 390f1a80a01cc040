"""The interval of a mean over episodes holds what it promises, also with few of them."""

import math

import numpy as np
import pytest
from scipy import stats

from vlafit.significance.clusters import mean_interval

FREE = (-math.inf, math.inf)


def test_the_interval_is_students_over_the_episodes():
    values = [0.3, 0.5, 0.1, 0.9]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    mean = mean_interval(values)
    assert (mean.value, mean.low, mean.high) == pytest.approx((np.mean(values), low, high))


def test_the_interval_of_what_has_a_least_or_largest_value_ends_there():
    wide = [0.01, 0.02, 0.97]
    free, errors, shares = (mean_interval(wide, within=w) for w in (FREE, (0, math.inf), (0, 1)))
    assert free.low is not None and free.high is not None and free.low < 0 and free.high > 1
    assert (errors.low, errors.high) == (0, free.high) and (shares.low, shares.high) == (0, 1)


def test_one_episode_has_a_mean_and_no_interval():
    assert mean_interval([0.4]).to_json() == {"value": 0.4, "low": None, "high": None}
    with pytest.raises(ValueError, match="no episodes"):
        mean_interval([])


@pytest.mark.parametrize("episodes", [2, 3, 10])
def test_it_covers_the_mean_in_95_of_100_cases_where_a_bootstrap_over_few_episodes_does_not(episodes):
    rng = np.random.default_rng(0)
    worlds = rng.normal(0.7, 0.2, (2000, episodes))
    intervals = [mean_interval(world) for world in worlds]
    covered = np.mean([i.low <= 0.7 <= i.high for i in intervals if i.low is not None and i.high is not None])
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5
    means = worlds[:, None][
        np.arange(2000)[:, None, None], 0, rng.integers(0, episodes, (2000, 200, episodes))
    ].mean(2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    bootstrap = np.mean((low <= 0.7) & (high >= 0.7))
    assert bootstrap < covered - 0.01
