"""`vlafit data check` blames no episode for what smooth motion does by chance, and finds turned signs."""

import numpy as np
import pytest

from benchmarks.action_sign import DRIVING, FREE, recorded, smooth
from tests.variants import variants
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.chance import curves, surrogates
from vlafit.datasets.checks.lags import FURTHEST_LAG, RELATED, _correlations, check_lags

SETS = 10
SIZES = ((4, 50, 6), (5, 60, 8), (8, 60, 8))


@pytest.mark.parametrize("size", variants(SIZES, always=[(5, 60, 8)]))
def test_actions_that_drive_no_state_give_an_error_in_hardly_any_small_set(size: tuple[int, int, int]):
    rng, wrong = np.random.default_rng(1), 0
    for number in range(SETS):
        columns = recorded(rng, *size, velocity=number % 2 == 0)
        untested = Untested()
        wrong += any(finding.severity == "error" for finding in check_lags(columns, [], untested))
        gaps = {on for gap in untested.listed() if "by chance" in gap.reason for on in gap.on}
        assert gaps <= {f"action dimension {d}" for d in range(DRIVING, DRIVING + FREE)}
    assert wrong <= 1  # at one in a hundred two of ten come once in 235 times


@pytest.mark.parametrize("velocity", [True, False])
def test_a_turned_sign_is_found_beside_actions_that_drive_no_state(velocity: bool):
    rng = np.random.default_rng(2)
    for number in range(3):
        columns = recorded(rng, 5, 60, 8, velocity)
        columns[number % 5][2][:, 1] *= -1
        errors = [f for f in check_lags(columns, [], Untested()) if f.severity == "error"]
        assert {("action_sign", f"episode {number % 5}")} == {(f.kind, f.episode) for f in errors}
        assert all("dimension 1 moves the state the opposite way" in f.message for f in errors)


def test_a_dimension_that_is_no_more_than_chance_says_so_with_both_correlations():
    columns = recorded(np.random.default_rng(3), 4, 36, 6, velocity=False)
    untested = Untested()
    check_lags(columns, [], untested)
    reasons = [gap.reason for gap in untested.listed() if "by chance" in gap.reason]
    assert reasons and all("with correlation 0." in reason and "reaches 0." in reason for reason in reasons)
    assert {gap.test for gap in untested.listed()} >= set(RELATED)


def test_surrogates_are_as_smooth_as_the_motion_and_curves_are_correlations():
    rng = np.random.default_rng(4)
    values = smooth(rng, 400, 1, 8)[:, 0]
    made = surrogates(values, 50, rng)
    lagged = lambda v: float(np.corrcoef(v[:-4], v[4:])[0, 1])  # noqa: E731
    assert made.shape == (400, 50)
    # it varies by about one over the root of the number of independent stretches, 400 / 28
    assert abs(np.mean([lagged(column) for column in made.T]) - lagged(values)) < 1 / np.sqrt(400 / 28)
    assert np.abs(np.corrcoef(made.T)[~np.eye(50, dtype=bool)]).mean() < 0.5
    state, actions = rng.normal(size=(60, 3)) + 100, rng.normal(size=(60, 2))
    actions[:, 1] = 5.0  # does not move
    both = [
        f(state, actions)
        for f in (lambda s, a: _correlations(s, a, False), lambda s, a: curves(s, a, FURTHEST_LAG))
    ]
    assert both[0].shape == both[1].shape == (2 * FURTHEST_LAG + 1, 2, 3)
    assert np.abs(both[0] - both[1]).max() < 60 * np.finfo(float).eps * (100 / state.std()) ** 2
