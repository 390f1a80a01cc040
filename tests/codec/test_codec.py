import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.robots import ROBOT, SENTENCES, codec, config, observation, sample, tokenizer
from vlafit.codec import Codec, CodecConfig, Statistics, Tokenizer
from vlafit.errors import CodecError, ConfigError, VlafitError
from vlafit.types import Feature, Observation


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_encoded_shape_is_the_configs(rng: np.random.Generator):
    encoded = codec(rng).encode(sample(rng))
    assert encoded.images.shape == (3, 3, 8, 8) and encoded.images.dtype == np.uint8
    assert encoded.image_mask.tolist() == [True, False, True]
    assert encoded.tokens.shape == encoded.token_mask.shape == (40,) and encoded.tokens.dtype == np.int64
    assert encoded.state.shape == (5,) and encoded.state.dtype == np.float32
    assert encoded.actions is not None and encoded.actions.shape == (3, 4)
    assert encoded.action_mask is not None and encoded.action_mask.dtype == np.bool_
    assert encoded.key == ("set", "file/demo_0", 4)


def test_cameras_fill_their_slots_channels_first_and_a_missing_one_is_black_and_masked(
    rng: np.random.Generator,
):
    whole = observation(rng)
    encoded = codec(rng).encode(whole)
    np.testing.assert_array_equal(encoded.images[0], whole.images["wrist"].transpose(2, 0, 1))
    assert not encoded.images[1].any()
    without = replace(whole, images={"wrist": whole.images["wrist"]})
    encoded = codec(rng).encode(without)
    assert encoded.image_mask.tolist() == [True, False, False]
    assert not encoded.images[2].any()


def test_an_image_is_copied_so_that_the_recording_cannot_be_changed(rng: np.random.Generator):
    seen = observation(rng)
    encoded = codec(rng).encode(seen)
    before = seen.images["wrist"].copy()
    encoded.images[:] = 0
    np.testing.assert_array_equal(seen.images["wrist"], before)


def test_the_mask_leaves_out_padded_dimensions_and_steps_past_the_end(rng: np.random.Generator):
    mask = codec(rng).encode(sample(rng, real=2)).action_mask
    assert mask is not None
    assert mask.tolist() == [[True, True, False, False]] * 2 + [[False] * 4]
    mask = codec(rng, mask_padding=False).encode(sample(rng, real=2)).action_mask
    assert mask is not None and mask.all()


def test_padding_is_zero_after_normalisation(rng: np.random.Generator):
    encoded = codec(rng).encode(sample(rng))
    assert encoded.actions is not None
    assert not encoded.state[3:].any() and not encoded.actions[:, 2:].any()


@functools.cache
def fitted(normalisation: str, relative: tuple[bool, ...]) -> Codec:
    """One codec for all examples that hypothesis draws."""
    return codec(np.random.default_rng(0), normalisation=normalisation, relative=relative)


@pytest.mark.parametrize("normalisation", ["mean_std", "quantile"])
@pytest.mark.parametrize("relative", [(), (True, False), (True, True)])
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_an_encoded_chunk_gives_the_robots_actions_back(
    normalisation: str, relative: tuple[bool, ...], seed: int
):
    made = fitted(normalisation, relative)
    given_sample = sample(np.random.default_rng(seed), real=3)
    encoded = made.encode(given_sample)
    assert encoded.actions is not None
    decoded = made.decode(encoded.actions, given_sample.observation)
    assert decoded.actions.dtype == np.float32
    # At most 8 roundings (subtract, divide, multiply, add, with or without a state) of numbers up to 4: 2e-6
    np.testing.assert_allclose(decoded.actions, given_sample.actions, rtol=0, atol=2e-6)


def test_relative_dimensions_are_minus_the_state_at_the_chunks_start(rng: np.random.Generator):
    made = codec(rng, relative=(False, True))
    one = sample(rng)
    state = one.observation.state
    moved = replace(one, observation=replace(one.observation, state=state + np.float32([0, 0.5, 0])))
    moved = replace(moved, actions=one.actions + np.float32([0, 0.5]))
    a, b = made.encode(one).actions, made.encode(moved).actions
    assert a is not None and b is not None
    # Numbers of up to 16 round to float32 by 2^-21 = 4.8e-7, twice.
    np.testing.assert_allclose(a, b, rtol=0, atol=2 * 2**-21)


def test_an_observation_encodes_as_the_sample_does_without_its_actions(rng: np.random.Generator):
    made, one = codec(rng, prompt="pi05", max_tokens=80), sample(rng)
    from_sample, alone = made.encode(one), made.encode(one.observation)
    assert alone.actions is None and alone.action_mask is None and alone.key is None
    for name in ("images", "image_mask", "tokens", "token_mask", "state"):
        np.testing.assert_array_equal(getattr(from_sample, name), getattr(alone, name))


def test_the_pi0_prompt_is_bos_text_and_newline(rng: np.random.Generator):
    made = codec(rng)
    encoded = made.encode(observation(rng, "open_the faucet"))
    tokens = made.tokenizer
    assert tokens.bos is not None
    expected = [tokens.bos, *tokens.encode("open the faucet"), *tokens.encode("\n")]
    assert encoded.tokens[encoded.token_mask].tolist() == expected
    assert set(encoded.tokens[~encoded.token_mask].tolist()) == {tokens.pad}


def test_the_pi05_prompt_holds_the_normalised_state_in_the_robots_own_dimensions(rng: np.random.Generator):
    made = codec(rng, prompt="pi05", normalisation="quantile", max_tokens=80)
    statistics = made.statistics["state"]
    seen = replace(observation(rng), state=statistics.q01.astype(np.float32) - np.float32([0.01, 0, 0]))
    encoded = made.encode(seen)
    text = made.tokenizer.decode(encoded.tokens[encoded.token_mask].tolist())
    bins = text.removeprefix("Task: open the faucet, State: ").removesuffix(";\nAction: ").split(" ")
    assert len(bins) == 3 and bins[0] == "-1"


def test_a_prompt_that_is_too_long_is_refused_never_cut(rng: np.random.Generator):
    made = codec(rng, max_tokens=5)
    assert made.encode(observation(rng, SENTENCES[0])).token_mask.all()
    with pytest.raises(CodecError, match="6 tokens.* 5.*max_tokens"):
        made.encode(observation(rng, "open the faucet faucet"))


def test_tokens_are_shared_between_samples_and_cannot_be_written_to(rng: np.random.Generator):
    made = codec(rng)
    one, two = made.encode(observation(rng)), made.encode(observation(rng))
    assert one.tokens is two.tokens
    with pytest.raises(ValueError, match="read-only"):
        one.tokens[0] = 9


def test_a_saved_codec_encodes_and_decodes_bit_for_bit_alike(rng: np.random.Generator, tmp_path: Path):
    before = codec(rng, prompt="pi05", normalisation="quantile", relative=(True, False), max_tokens=80)
    before.save(tmp_path)
    after = Codec.load(tmp_path)
    assert (after.config, after.embodiment) == (before.config, before.embodiment)
    one = sample(rng)
    first, second = before.encode(one), after.encode(one)
    for name in ("images", "image_mask", "tokens", "token_mask", "state", "actions", "action_mask"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    output = rng.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        before.decode(output, one.observation).actions, after.decode(output, one.observation).actions
    )
    after.save(tmp_path / "again")
    assert (tmp_path / "again/codec.json").read_bytes() == (tmp_path / "codec.json").read_bytes()
    again = (tmp_path / "again/tokenizer/tokenizer.json").read_bytes()
    assert again == (tmp_path / "tokenizer/tokenizer.json").read_bytes()


def test_statistics_are_stored_under_the_embodiments_name(rng: np.random.Generator, tmp_path: Path):
    codec(rng).save(tmp_path)
    assert set(json.loads((tmp_path / "codec.json").read_text())["statistics"]) == {"arm"}


def test_a_codec_is_fitted_on_several_datasets_row_by_row(rng: np.random.Generator):
    states, actions = rng.normal(size=(9, 3)), rng.normal(size=(8, 2))
    parts = Codec.fit(config(), ROBOT, [states[:4], states[4:]], [actions[:1], actions[1:]], tokenizer())
    whole = Codec.fit(config(), ROBOT, states, actions, tokenizer())
    np.testing.assert_array_equal(parts.statistics["state"].q99, whole.statistics["state"].q99)
    assert parts.statistics["action"].count == 8
    with pytest.raises(CodecError, match="must be alike"):
        Codec.fit(config(), ROBOT, [states, states[:, :2]], actions, tokenizer())


BAD_OBSERVATIONS = [
    ({"state": np.zeros(4, np.float32)}, r"state has shape \(4,\), embodiment 'arm' says \(3,\)"),
    ({"state": np.array([0, np.nan, 0], np.float32)}, "state is not finite"),
    ({"instruction": " \n"}, "instruction is empty"),
    ({"images": {}}, r"no image of any of the policy's cameras \(wrist, front\)"),
    ({"images": {"top": np.zeros((8, 8, 3), np.uint8)}}, "no camera 'top'; it has: front, wrist"),
    ({"images": {"wrist": np.zeros((9, 8, 3), np.uint8)}}, r"camera 'wrist' gives uint8 \(9, 8, 3\)"),
    ({"images": {"wrist": np.zeros((8, 8, 3), np.float32)}}, "camera 'wrist' gives float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OBSERVATIONS)
def test_an_observation_that_is_not_the_embodiments_is_refused_by_field(
    rng: np.random.Generator, change: dict[str, object], message: str
):
    with pytest.raises(VlafitError, match=message):
        codec(rng).encode(replace(observation(rng), **change))  # type: ignore[arg-type]


BAD_SAMPLES = [
    ({"actions": np.zeros((4, 2), np.float32)}, r"shape \(4, 2\), this codec takes \(3, 2\): chunk 3"),
    ({"actions": np.zeros((3, 3), np.float32)}, r"shape \(3, 3\), this codec takes \(3, 2\)"),
    ({"actions": np.array([[0, 0], [0, np.inf], [0, 0]], np.float32)}, "not finite at step 1.*demo_0"),
    ({"is_real": np.ones(2, np.bool_)}, r"is_real must be bool \[3\]"),
    ({"is_real": np.ones(3)}, "is_real must be bool"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SAMPLES)
def test_a_sample_that_does_not_fit_is_refused_by_field(
    rng: np.random.Generator, change: dict[str, object], message: str
):
    with pytest.raises(CodecError, match=message):
        codec(rng).encode(replace(sample(rng), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\), this codec decodes \(3, 4\)"),
        (np.full((3, 4), np.nan), "not finite"),
    ],
)
def test_a_broken_output_of_the_policy_is_refused(rng: np.random.Generator, output: np.ndarray, message: str):
    with pytest.raises(CodecError, match=message):
        codec(rng).decode(output, observation(rng))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("top",)}, "no camera 'top'"),
        ({"cameras": ("front", "front")}, "one slot only"),
        ({"state_dim": 2}, "3 state dimensions, the policy takes 2"),
        ({"action_dim": 1}, "2 action dimensions, the policy takes 1"),
        ({"relative": (True,)}, "1 entries for 2 action dimensions"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_a_config_that_does_not_fit_the_embodiment_is_refused(
    rng: np.random.Generator, change: dict[str, object], message: str
):
    with pytest.raises(VlafitError, match=message):
        codec(rng, **change)


def test_relative_needs_a_state_dimension_to_be_relative_to(rng: np.random.Generator):
    short = replace(ROBOT, state=Feature("state", (1,)))
    with pytest.raises(CodecError, match=r"action dimensions \[1\] have no state"):
        Codec.fit(config(relative=(True, True)), short, np.eye(1), np.eye(2), tokenizer())


def test_statistics_of_another_robot_are_refused(rng: np.random.Generator):
    found = {"state": Statistics.of(np.eye(4)), "action": Statistics.of(np.eye(2))}
    with pytest.raises(CodecError, match="state.* 4 dimensions.*'arm' has 3"):
        Codec(config(), ROBOT, found, tokenizer())
    with pytest.raises(CodecError, match="those of state and action"):
        Codec(config(), ROBOT, {"state": Statistics.of(np.eye(3))}, tokenizer())


def test_a_prompt_that_begins_with_bos_needs_a_tokenizer_that_has_one(rng: np.random.Generator):
    made = codec(rng)
    bare = Tokenizer(made.tokenizer.backend, 0, None, None)
    with pytest.raises(CodecError, match="begins with a bos token"):
        Codec(made.config, ROBOT, made.statistics, bare)
    Codec(replace(made.config, prompt="text"), ROBOT, made.statistics, bare)


BAD_FILES = [
    (lambda c: c | {"format": 2}, CodecError, "format 2"),
    (lambda c: {k: v for k, v in c.items() if k != "config"}, CodecError, "exactly the keys"),
    (lambda c: c | {"more": 1}, CodecError, "exactly the keys"),
    (lambda c: c | {"config": c["config"] | {"chunks": 3}}, ConfigError, "unknown key 'chunks'.*'chunk'"),
    (lambda c: c | {"config": c["config"] | {"chunk": "3"}}, ConfigError, "chunk"),
    (lambda c: c | {"embodiment": c["embodiment"] | {"hz": None}}, ConfigError, "hz"),
    (lambda c: c | {"statistics": {"other": c["statistics"]["arm"]}}, CodecError, "no statistics for"),
    (lambda c: c | {"statistics": {"arm": {"state": 1}}}, CodecError, "statistics.arm.state"),
    (lambda c: [], CodecError, "exactly the keys"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_FILES)
def test_a_codec_file_that_was_tampered_with_is_refused(
    rng: np.random.Generator, tmp_path: Path, change, error: type[Exception], message: str
):
    codec(rng).save(tmp_path)
    path = tmp_path / "codec.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(error, match=message) as caught:
        Codec.load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_folder_without_a_codec_or_with_a_torn_one_is_refused(tmp_path: Path):
    with pytest.raises(CodecError, match=r"codec\.json: cannot be read.*checkpoint's folder"):
        Codec.load(tmp_path)
    (tmp_path / "codec.json").write_text("{")
    with pytest.raises(CodecError, match="not JSON"):
        Codec.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(rng: np.random.Generator, tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(VlafitError, match=r"cannot write .*taken"):
            codec(rng).save(folder)
        with pytest.raises(VlafitError, match=r"cannot write .*taken"):
            tokenizer().save(folder)


def test_a_codec_can_be_sent_to_another_process(rng: np.random.Generator):
    import pickle

    made, one = codec(rng), sample(rng)
    again = pickle.loads(pickle.dumps(made))  # noqa: S301
    np.testing.assert_array_equal(again.encode(one).tokens, made.encode(one).tokens)


def test_config_fields_all_have_help():
    from vlafit.config import field_help

    assert set(field_help(CodecConfig)) == set(CodecConfig.__dataclass_fields__)


# ------------------------------------------------------------------------------------------------- history


def _episode(rng: np.random.Generator, steps: int) -> Observation:
    """The newest of `steps` observations, with the earlier ones in its past."""
    *earlier, newest = [observation(rng) for _ in range(steps)]
    return replace(newest, past=tuple(earlier))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_history_is_the_newest_steps_padded_at_the_start_by_the_first_one(
    rng: np.random.Generator, steps: int
):
    seen = _episode(rng, steps)
    made, single = codec(np.random.default_rng(0), history=3), codec(np.random.default_rng(0))
    encoded = made.encode(seen)
    everything = [*seen.past, replace(seen, past=())]
    expected = ([everything[0]] * 2 + everything)[-3:] if steps < 3 else everything[-3:]
    each = [single.encode(one) for one in expected]
    np.testing.assert_array_equal(encoded.images, np.stack([e.images for e in each]))
    np.testing.assert_array_equal(encoded.image_mask, np.stack([e.image_mask for e in each]))
    np.testing.assert_array_equal(encoded.state, np.stack([e.state for e in each]))
    assert encoded.history_mask is not None
    assert encoded.history_mask.tolist() == [i >= 3 - steps for i in range(3)]
    np.testing.assert_array_equal(encoded.tokens, single.encode(replace(seen, past=())).tokens)


def test_without_a_history_the_past_changes_nothing_and_no_axis_is_added(rng: np.random.Generator):
    seen, made = _episode(rng, 3), codec(np.random.default_rng(0))
    with_past, without = made.encode(seen), made.encode(replace(seen, past=()))
    assert with_past.history_mask is None and with_past.images.ndim == 4 and with_past.state.ndim == 1
    for name in ("images", "image_mask", "state", "tokens"):
        np.testing.assert_array_equal(getattr(with_past, name), getattr(without, name))


def test_a_codec_saved_before_there_were_histories_loads_with_one_step(
    rng: np.random.Generator, tmp_path: Path
):
    codec(rng).save(tmp_path)
    content = json.loads((tmp_path / "codec.json").read_text())
    assert content["config"].pop("history") == 1
    (tmp_path / "codec.json").write_text(json.dumps(content))
    assert Codec.load(tmp_path).config.history == 1


def test_a_relative_action_is_relative_to_the_newest_state_of_a_history(rng: np.random.Generator):
    one = sample(rng)
    earlier = observation(rng)
    longer = replace(one, observation=replace(one.observation, past=(earlier,)))
    made = codec(np.random.default_rng(0), relative=(True, True), history=2)
    single = codec(np.random.default_rng(0), relative=(True, True))
    np.testing.assert_array_equal(made.encode(longer).actions, single.encode(one).actions)
