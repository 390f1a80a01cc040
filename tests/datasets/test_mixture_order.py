"""The order of a mixture: shares are exact, samples rarely repeat, and nothing but the seed decides it."""

from collections import Counter

import pytest

from vlafit.datasets import MixtureOrder
from vlafit.datasets.order import BLOCK, shares
from vlafit.errors import DataError


def test_every_block_holds_each_dataset_exactly_as_often_as_its_weight_says():
    order = MixtureOrder((50, 1000, 7), (2.0, 1.0, 1.0), seed=5)
    for block in (0, 3):
        indices = [order.sample(k)[1] for k in range(block * BLOCK, (block + 1) * BLOCK)]
        assert sum(i < 50 for i in indices) == 5000
        assert sum(50 <= i < 1050 for i in indices) == 2500
        assert sum(i >= 1050 for i in indices) == 2500


def test_a_stretch_anywhere_holds_about_its_share_of_each():
    order = MixtureOrder((400, 400), (3.0, 1.0), seed=0)
    for first in (0, 777, BLOCK - 16):
        small = sum(order.sample(k)[1] >= 400 for k in range(first, first + 32))
        assert 5 <= small <= 11, f"of 32 samples {small} are of the dataset with a quarter of the weight"


def test_each_dataset_is_seen_whole_once_in_each_of_its_own_epochs():
    order = MixtureOrder((6, 40), (1.0, 1.0), seed=2)
    seen = Counter(order.sample(k) for k in range(240))
    assert set(seen.values()) == {1}, "a sample was repeated within an epoch of its dataset"
    for epoch in range(10):
        assert {i for e, i in seen if e == epoch and i < 6} == set(range(6))


def test_a_batch_is_a_function_of_seed_and_step_whatever_was_asked_before():
    fresh, used = (MixtureOrder((30, 20), (0.3, 0.7), seed=1) for _ in range(2))
    for step in (4000, 2, 11):
        used.batch(step, 8)
    for step in (0, 5, 2 * BLOCK // 8):
        assert fresh.batch(step, 8) == used.batch(step, 8)
        assert fresh.batch(step, 8) == used.batch(2 * step, 4) + used.batch(2 * step + 1, 4)
    assert fresh.batch(0, 8) != MixtureOrder((30, 20), (0.3, 0.7), seed=2).batch(0, 8)


def test_only_the_ratio_of_weights_matters_and_shares_add_up():
    assert shares((0.7, 0.3)) == shares((7, 3)) == (7000, 3000)
    assert sum(shares((1, 1, 1))) == BLOCK


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0, 0.0), "above 0"), ((1.0, float("inf")), "finite"), ((1.0, 1e-6), "1 in 10000")],
)
def test_weights_that_cannot_be_drawn_are_refused(weights: tuple[float, ...], message: str):
    with pytest.raises(DataError, match=message):
        MixtureOrder((3, 3), weights, seed=0)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="no samples"):
        MixtureOrder((3, 0), (1.0, 1.0), seed=0)
