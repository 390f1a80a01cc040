import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlafit.codec.normaliser import FURTHEST, Normalisation, Normaliser
from vlafit.codec.statistics import Statistics
from vlafit.errors import CodecError, DataError

METHODS: tuple[Normalisation, ...] = ("mean_std", "quantile")
VALUES = arrays(np.float64, (40, 3), elements=st.floats(-1e4, 1e4, width=32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_quantiles_are_true_quantiles_and_std_is_the_populations():
    values = np.arange(1001, dtype=np.float64)[::-1, None] * [1, -2]
    found = Statistics.of(values)
    assert found.count == 1001
    # An interpolation rounds a few times, a sum of 1001 squares in another order once a term.
    np.testing.assert_allclose(found.q01, [10, -1980], rtol=8 * 2**-53)
    np.testing.assert_allclose(found.q99, [990, -20], rtol=8 * 2**-53)
    np.testing.assert_allclose(found.std, values.std(axis=0, ddof=0), rtol=1001 * 2**-53)
    np.testing.assert_array_equal(found.min, [0, -2000])
    np.testing.assert_array_equal(found.max, [1000, 0])


def test_a_rare_outlier_does_not_move_the_quantiles_as_a_coarse_histogram_would():
    values = np.concatenate([np.linspace(0, 1, 10_000), [1e6]])[:, None]
    # One more value moves the quantile by one of 10,000 steps.
    assert Statistics.of(values).q99[0] == pytest.approx(0.99, abs=1e-4)


def test_statistics_survive_json_bit_for_bit(rng: np.random.Generator):
    import json

    before = Statistics.of(rng.normal(size=(100, 4)))
    after = Statistics.from_json(json.loads(json.dumps(before.to_json())), "here")
    for name in ("mean", "std", "q01", "q99", "min", "max"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 2)), "no values"),
        (np.zeros(3), r"\[n, d\]"),
        (np.zeros((3, 0)), r"\[n, d\]"),
        (np.array([[0, 1], [2, np.nan]]), r"state.*nan in row 1, dimension 1 \(gripper\)"),
        (np.array([[np.inf, 1]]), r"inf in row 0, dimension 0 \(x\)"),
    ],
)
def test_values_without_statistics_are_refused_by_name(values: np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        Statistics.of(values, "state", ("x", "gripper"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "lists of numbers|lists of one length"),
        ({"mean": [1.0]}, "one length"),
        ({"std": [float("nan"), 1.0]}, "not finite"),
        ({"count": "3"}, "count must be a whole number from 0, got '3'"),
        ({"count": -3}, "count must be a whole number from 0, got -3"),
        ({"count": True}, "count must be a whole number from 0, got True"),
        ({"std": [0.5, -1.0]}, r"std is negative: \[0.5, -1.0\]"),
        ({"std": ["1", "1"]}, "lists of numbers: std holds '1'"),
        ({"min": [True, False]}, "lists of numbers: min holds True"),
        ({"q01": [9.0, 0.0]}, "q01 is 9 and q99 0.99 in dimension 0"),
        ({"max": [1.0, -1.0]}, "min is 0 and max -1 in dimension 1"),
        ({"extra": 1}, "exactly"),
    ],
)
def test_malformed_statistics_are_refused(change: dict[str, object], message: str):
    good = Statistics.of(np.eye(2)).to_json()
    with pytest.raises(CodecError, match=message):
        Statistics.from_json(good | change, "codec.json")


@pytest.mark.parametrize("method", METHODS)
@given(values=VALUES)
def test_decoding_undoes_encoding(method: Normalisation, values: np.ndarray):
    normaliser = Normaliser.fit(Statistics.of(values), method)
    again = normaliser.decode(normaliser.encode(values))
    # 8 roundings of numbers up to 4e4, the widest range and its distance from the centre: 3.6e-11.
    np.testing.assert_allclose(again, values, rtol=0, atol=8 * 2**-53 * 4e4)


@pytest.mark.parametrize("method", METHODS)
@given(values=VALUES)
def test_no_recorded_value_explodes(method: Normalisation, values: np.ndarray):
    encoded = Normaliser.fit(Statistics.of(values), method).encode(values)
    assert np.abs(encoded).max() <= FURTHEST + 1


def test_ordinary_dimensions_are_normalised_by_the_references_formulas(rng: np.random.Generator):
    values = rng.normal(size=(1000, 2)) * [0.01, 100]
    s = Statistics.of(values)
    np.testing.assert_array_equal(
        Normaliser.fit(s, "mean_std").encode(values), (values - s.mean) / (s.std + 1e-6)
    )
    np.testing.assert_array_equal(
        Normaliser.fit(s, "quantile").encode(values), (values - s.q01) / (s.q99 - s.q01 + 1e-6) * 2 - 1
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_dimension_that_hardly_moves_stays_small_where_the_formula_gives_thousands(method: Normalisation):
    values = np.zeros((2000, 1))
    values[7] = 0.04  # a gripper that moved once
    s = Statistics.of(values)
    assert (values[7] - s.q01) / (s.q99 - s.q01 + 1e-6) * 2 - 1 > 10_000
    normaliser = Normaliser.fit(s, method)
    assert np.abs(normaliser.encode(values)).max() <= FURTHEST + 1
    # 8 roundings of numbers below 1, once the divisor is multiplied back.
    np.testing.assert_allclose(normaliser.decode(normaliser.encode(values)), values, rtol=0, atol=8 * 2**-53)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_dimension_encodes_to_zero_and_an_unforeseen_value_stays_small(method: Normalisation):
    normaliser = Normaliser.fit(Statistics.of(np.full((10, 1), 0.04)), method)
    # Value, mean and offset round by 2^-53 * 0.04 and are divided by 0.01, then 3 roundings of 1: 15 * 2^-53.
    np.testing.assert_allclose(normaliser.encode(np.array([[0.04]])), 0, atol=16 * 2**-53)
    assert np.abs(normaliser.encode(np.array([[0.3]]))).max() <= FURTHEST
    np.testing.assert_allclose(normaliser.decode(np.array([[0.0]])), 0.04, rtol=8 * 2**-53)


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    width=st.integers(1, 30),
    at_once=st.integers(1, 5000),
)
def test_statistics_of_blocks_are_those_of_one_array_bit_for_bit(
    seed: int, lengths: list[int], width: int, at_once: int
):
    rng = np.random.default_rng(seed)
    blocks = [rng.normal(size=(n, width)).astype(np.float32) * 10.0 ** rng.integers(-3, 4) for n in lengths]
    whole = np.concatenate(blocks).astype(np.float64)
    expected = {
        "mean": whole.mean(axis=0),
        "std": whole.std(axis=0),
        "q01": np.quantile(whole, 0.01, axis=0),
        "q99": np.quantile(whole, 0.99, axis=0),
        "min": whole.min(axis=0),
        "max": whole.max(axis=0),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlafit.codec.statistics.QUANTILE_VALUES", at_once)
        made = Statistics.of_blocks(blocks)
    assert made.count == len(whole)
    for name, value in expected.items():
        np.testing.assert_array_equal(made.array(name), value)


def test_blocks_of_different_widths_are_refused_by_name():
    with pytest.raises(CodecError, match="state.*3 and 4"):
        Statistics.of_blocks([np.zeros((2, 3)), np.zeros((2, 4))], "state")
