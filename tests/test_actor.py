"""What a policy returns for an observation depends on that observation and its key, and on nothing else."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.variants import variants
from vlafit.actor import PolicyActor
from vlafit.codec import Codec, CodecConfig, Statistics, train_word_tokenizer
from vlafit.codec.state_watch import StateWatch
from vlafit.errors import CodecError, ConfigError, EmbodimentError
from vlafit.inference import accelerated
from vlafit.nn.batch import Batch
from vlafit.nn.rng import SampleRng
from vlafit.policies import pi0
from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Feature, Observation

TASKS = ("open", "close", "push")


def robot(size: int) -> Embodiment:
    return Embodiment(
        name="arm",
        cameras=(Feature("front", (size, size, 3)), Feature("wrist", (size, size, 3))),
        state=Feature("state", (4,)),
        action=Feature("action", (4,)),
        hz=10.0,
        control="delta_position",
    )


def make_actor(
    size: str = "pi0-tiny", slots: Sequence[str] = ("front", "wrist"), width: int = 8
) -> PolicyActor:
    made = pi0.SIZES[size]
    # The tiny vocabulary has room for the bytes and little more.
    tokenizer = train_word_tokenizer([f"{task} the door" for task in TASKS], made.language.vocab)
    settings = CodecConfig(
        cameras=tuple(slots),
        image_size=made.vision.image_size,
        state_dim=made.state_dim,
        action_dim=made.action_dim,
        chunk=made.chunk,
        prompt="pi05" if made.pi05 else "pi0",
        max_tokens=made.max_tokens,
    )
    rng = np.random.default_rng(3)
    codec = Codec.fit(
        settings, robot(made.vision.image_size), rng.normal(size=(50, 4)), rng.normal(size=(50, 4)), tokenizer
    )
    policy = pi0.build(made, "cpu")
    policy.steps = 3
    return PolicyActor(policy, codec, width=width)


def inputs(n: int, size: int) -> tuple[list[Observation], list[EpisodeKey]]:
    rng = np.random.default_rng(5)
    observations = []
    for i in range(n):
        pictures = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name in ("front", "wrist")}
        if i % 3 == 2:
            del pictures["wrist"]  # a camera may be missing at a moment
        state = rng.normal(size=4).astype(np.float32)
        observations.append(Observation(pictures, state, f"{TASKS[i % 3]} the door"))
    return observations, [EpisodeKey(100 + i // 3, TASKS[i % 3], i % 4) for i in range(n)]


def bits(chunks: Sequence[ActionChunk]) -> list[bytes]:
    return [chunk.actions.tobytes() for chunk in chunks]


@pytest.mark.parametrize("size", variants(["pi0-tiny", "pi0-small", "pi05-small"], ["pi0-tiny"]))
def test_an_action_does_not_depend_on_what_else_is_in_the_batch_nor_where(size: str) -> None:
    actor = make_actor(size)
    observations, keys = inputs(19, pi0.SIZES[size].vision.image_size)
    whole = bits(actor.act(observations, keys))
    assert len(set(whole)) == 19
    alone = [bits(actor.act([o], [k]))[0] for o, k in zip(observations, keys, strict=True)]
    assert alone == whole
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(19)[: 19 - 4 * seed]
        got = bits(actor.act([observations[i] for i in order], [keys[i] for i in order]))
        assert got == [whole[i] for i in order]


def test_every_batch_has_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = make_actor(slots=("front", "", "wrist"))
    shapes = set()
    act = pi0.Pi0.act

    def spy(self: pi0.Pi0, batch: Batch, rng: SampleRng) -> torch.Tensor:
        shapes.add((tuple(batch.images.shape), tuple(batch.prompt()[0].shape), len(rng)))
        return act(self, batch, rng)

    monkeypatch.setattr(pi0.Pi0, "act", spy)
    observations, keys = inputs(11, 8)
    for n in (1, 2, 8, 11):
        actor.act(observations[:n], keys[:n])
    assert shapes == {((8, 2, 3, 8, 8), (8, 12), 8)}  # the slot that is always missing is left out


def test_acting_leaves_the_policy_in_the_mode_it_was_in() -> None:
    actor = make_actor()
    actor.policy.train()
    actor.policy.get_submodule("vision").eval()
    before = {name: module.training for name, module in actor.policy.named_modules()}
    actor.act(*inputs(2, 8))
    assert before == {name: module.training for name, module in actor.policy.named_modules()}
    assert all(p.grad is None for p in actor.policy.parameters())


def test_the_fingerprint_tells_weights_and_settings_apart() -> None:
    actor = make_actor()
    first = actor.fingerprint()
    assert first == make_actor().fingerprint()
    with torch.no_grad():
        next(actor.policy.parameters()).view(-1)[0] += 1
    changed = actor.fingerprint()
    actor.policy.steps = 10
    assert len({first, changed, actor.fingerprint()}) == 3
    named = PolicyActor(actor.policy, actor.codec, width=16, identity="checkpoint 12")
    assert named.fingerprint() == "checkpoint 12 steps=10 width=16 seed=0 device=cpu"
    accelerated(named.policy, compile=True)
    assert named.fingerprint() == "checkpoint 12 steps=10 compiled width=16 seed=0 device=cpu"
    named.policy.to("meta")  # another device has other last bits, so half an evaluation each would be neither
    assert named.fingerprint() == "checkpoint 12 steps=10 compiled width=16 seed=0 device=meta"


@pytest.mark.parametrize("change", [{"width": 0}, {"seed": -1}])
def test_settings_that_cannot_be_are_refused(change: dict) -> None:
    actor = make_actor()
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be a whole number from"):
        PolicyActor(actor.policy, actor.codec, **change)


def test_what_is_no_observation_of_the_robot_is_refused_by_name() -> None:
    actor = make_actor()
    (observation,), keys = inputs(1, 8)
    wrong = {
        r"state: has shape \(3,\)": dataclasses.replace(observation, state=np.zeros(3, np.float32)),
        "camera 'top'": dataclasses.replace(observation, images={"top": observation.images["front"]}),
        "instruction: must be a sentence": dataclasses.replace(observation, instruction=" "),
    }
    for message, one in wrong.items():
        with pytest.raises(EmbodimentError, match=message):
            actor.act([one], keys)
    with pytest.raises(ConfigError, match="1 observations with 0 keys"):
        actor.act([observation], [])
    assert actor.act([], []) == []


def test_a_policy_with_a_history_is_never_shown_only_the_newest_step_after_the_start():
    actor = make_actor()
    settings = dataclasses.replace(actor.codec.config, history=2)
    codec = Codec(settings, actor.codec.embodiment, actor.codec.statistics, actor.codec.tokenizer)
    observations, keys = inputs(1, codec.config.image_size)
    later = [dataclasses.replace(keys[0], replan=1)]
    with pytest.raises(CodecError, match=r"2 observation steps.*Observation\.past"):
        PolicyActor(actor.policy, codec, width=8).act(observations, later)


def test_a_state_far_outside_the_statistics_is_logged_once_for_each_dimension(
    caplog: pytest.LogCaptureFixture,
) -> None:
    actor = make_actor(width=1)
    (observation,), (key,) = inputs(1, actor.embodiment.cameras[0].shape[0])
    actor.act([observation], [key])
    assert not caplog.records
    degrees = dataclasses.replace(observation, state=np.float32([0.1, 143.0, 0.2, -99.0]))
    for _ in range(2):
        actor.act([degrees], [key])
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "state.1 = 143" in texts[0] and "state.3 = -99" in texts[1]


def test_a_rare_state_that_was_recorded_is_no_warning() -> None:
    rows = np.zeros((400, 2))
    rows[:, 0] = np.sin(np.arange(400))
    rows[7, 1] = 1.0  # a gripper that opens once
    robot = Embodiment("arm", (Feature("front", (16, 16, 3)),), *[Feature("state", (2,))] * 2, 10.0, "joint")
    config = CodecConfig(("front",), 16, 2, 2, 4, prompt=None)
    watch = StateWatch(Codec.fit(config, robot, rows, rows, None))
    assert watch.sentences(np.float32([0.5, 1.0])) == []
    (sentence,) = watch.sentences(np.float32([0.5, 3.0]))
    assert "state.1 = 3" in sentence


# A gantry of three axes, in mm; in metres its state is normalised to -0.3, -6.2 and -1.9.
LOW, HIGH = np.array([-499.0, 398.0, 46.0]), np.array([303.0, 858.0, 424.0])


def gantry(*, ranged: bool = True, quantiles: bool = True) -> StateWatch:
    mean, std = np.array([36.5, 629.5, 180.8]), np.array([121.1, 100.7, 97.5])
    statistics = Statistics(1029, mean, std)
    if quantiles:
        statistics = dataclasses.replace(
            statistics, q01=np.array([-429.0, 400.0, 46.5]), q99=np.array([287.6, 851.0, 412.3])
        )
    if ranged:
        statistics = dataclasses.replace(statistics, min=LOW, max=HIGH)
    column = Feature("state", (3,), "mm", ("x", "y", "z"))
    robot = Embodiment("gantry", (Feature("table", (16, 16, 3)),), column, column, 10.0, "joint")
    config = CodecConfig(("table",), 16, 3, 3, 4, prompt=None, normalisation="mean_std")
    return StateWatch(Codec(config, robot, {"state": statistics, "action": statistics}, None))


@pytest.mark.parametrize(
    ("scale", "units"),
    [
        (1 / 1000, "m where they are of mm"),
        (1 / 100, "0 to 1 where they are of 0 to 100"),
        (np.pi / 180, "radians where the statistics are of degrees"),
        (180 / np.pi, "degrees where the statistics are of radians"),
    ],
)
def test_a_state_in_another_unit_is_named_with_its_range_and_the_likely_scale(scale, units) -> None:
    watch, state = gantry(), np.array([36.0, 629.0, 180.0]) * scale
    sentences = watch.sentences(state)
    (y,) = [sentence for sentence in sentences if "state.y = " in sentence]
    assert f"state.y = {state[1]:.4g} is far outside" in y and "398 to 858 mm" in y and units in y
    assert watch.sentences(state) == []


@pytest.mark.parametrize("quantiles", [True, False])
def test_a_slip_of_units_is_found_without_a_recorded_range(quantiles: bool) -> None:
    for scale, units in ((1 / 1000, "m where they are of mm"), (1000, "mm where they are of m")):
        sentences = gantry(ranged=False, quantiles=quantiles).sentences(
            np.array([36.0, 629.0, 180.0]) * scale
        )
        assert "state.y" in "".join(sentences) and all(units in sentence for sentence in sentences)


def test_no_state_within_or_somewhat_outside_the_range_is_a_warning() -> None:
    rng, watch = np.random.default_rng(0), gantry()
    width = HIGH - LOW
    for state in rng.uniform(LOW - 0.2 * width, HIGH + 0.2 * width, (2000, 3)):
        assert watch.sentences(state) == []
    # clearly outside in one axis, as of a robot that starts at its rest: no factor brings all inside
    assert watch.sentences(np.array([-499.0, 250.0, 424.0])) == []
    assert watch.sentences(np.array([0.0, 0.0, 0.0])) == []


@pytest.mark.parametrize(
    ("width", "rows"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 8), (7, 8), (9, 16), (16, 16)]
)
def test_a_batch_has_one_row_or_a_power_of_two_from_four_on(width: int, rows: int) -> None:
    actor = make_actor(width=width)
    seen: list[int] = []
    act = actor.policy.act
    actor.policy.act = lambda batch, rng: (seen.append(len(batch.images)), act(batch, rng))[1]  # pyright: ignore
    observations, keys = inputs(width, 8)
    together = bits(actor.act(observations, keys))
    assert seen == [rows] and f"width={rows} " in actor.fingerprint()
    assert [bits(actor.act([o], [k]))[0] for o, k in zip(observations, keys, strict=True)] == together
