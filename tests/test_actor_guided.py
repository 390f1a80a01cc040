"""A policy that continues a chunk: real units in, and nobody else's answer changes."""

import dataclasses

import numpy as np
import pytest

from tests.test_actor import bits, inputs, make_actor
from vlafit.actor import PolicyActor
from vlafit.errors import ConfigError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.types import ActionChunk, Committed, Guidance, Prefix


@pytest.mark.parametrize("jacobian", [True, False])
def test_a_continuation_changes_its_own_row_alone_and_is_the_same_in_any_batch(jacobian: bool) -> None:
    actor = make_actor(width=4)
    observations, keys = inputs(7, 8)
    free = bits(actor.act(observations, keys))
    guidance = Guidance(jacobian=jacobian)
    left = Committed(np.full((3, 4), 0.5, np.float32), 1, 3, guidance)
    committed = [left if i % 2 else None for i in range(7)]
    mixed = bits(actor.act_guided(observations, keys, committed))
    assert [a == b for a, b in zip(free, mixed, strict=True)] == [i % 2 == 0 for i in range(7)]
    for i in range(7):
        (one,) = bits(actor.act_guided([observations[i]], [keys[i]], [committed[i]]))
        assert one == mixed[i]


def test_a_chunk_is_held_to_what_is_committed_more_the_stronger_the_guidance() -> None:
    actor = make_actor(width=4)
    actor.policy.steps = 10
    observations, keys = inputs(4, 8)
    wanted = [chunk.actions + 1.0 for chunk in actor.act(observations, keys)]
    distances = []
    for strength in (0.001, 1.0, 5.0):
        guidance = Guidance("ones", strength, jacobian=False)
        committed = [Committed(actions, 4, 4, guidance) for actions in wanted]
        chunks = actor.act_guided(observations, keys, committed)
        distances.append(
            float(np.mean([np.abs(c.actions - w).mean() for c, w in zip(chunks, wanted, strict=True)]))
        )
    assert distances[0] > 0.99 and distances[0] > distances[1] > distances[2] and distances[2] < 0.1


def test_actions_encoded_and_decoded_are_the_same_relative_ones_too() -> None:
    codec = make_actor().codec
    (observation,), _ = inputs(1, 8)
    for relative in ((), (True, False, True, False)):
        config = dataclasses.replace(codec.config, relative=relative)
        made = type(codec)(config, codec.embodiment, codec.statistics, codec.tokenizer)
        actions = np.random.default_rng(0).normal(size=(config.chunk, 4)).astype(np.float32)
        back = made.decode(made.encode_actions(actions, observation), observation)
        assert isinstance(back, ActionChunk)
        np.testing.assert_allclose(back.actions, actions, rtol=0, atol=2e-6)


def test_a_policy_that_was_trained_with_delays_is_given_what_is_committed_where_it_learned_to_be() -> None:
    plain, actor = make_actor(width=4), make_actor(width=4)
    assert isinstance(actor.policy, FlowPolicy)
    actor.policy.max_delay = 2
    observations, keys = inputs(3, 8)
    old = [chunk.actions + 1.0 for chunk in actor.act(observations, keys)]

    def held(by: PolicyActor, delay: int, prefix: Prefix = "auto") -> list[ActionChunk]:
        committed = [Committed(actions, delay, 4, Guidance(prefix=prefix)) for actions in old]
        return by.act_guided(observations, keys, committed)

    for chunk, actions in zip(held(actor, 2), old, strict=True):
        # The first steps go through the codec both ways, which rounds numbers of up to 4 three times.
        np.testing.assert_allclose(chunk.actions[:2], actions[:2], rtol=0, atol=3 * 4 * 2**-24)
    assert bits(held(actor, 2)) == bits(held(actor, 2, "clean"))
    assert bits(held(actor, 0)) == bits(actor.act(observations, keys))  # nothing is committed
    assert bits(held(actor, 3)) == bits(held(plain, 3))  # it did not learn to be given three
    assert bits(held(actor, 2, "inpaint")) == bits(held(plain, 2))
    with pytest.raises(ConfigError, match=r"3 steps of its chunk, but it was trained for at most 2"):
        held(actor, 3, "clean")
    with pytest.raises(ConfigError, match=r"2 steps of its chunk, but it was not trained for it"):
        held(plain, 2, "clean")


def test_a_chunk_after_given_steps_is_the_same_in_any_batch() -> None:
    actor = make_actor(width=4)
    assert isinstance(actor.policy, FlowPolicy)
    actor.policy.max_delay = 3
    observations, keys = inputs(7, 8)
    rows = np.random.default_rng(0).normal(size=(7, 4, 4)).astype(np.float32)
    committed = [Committed(actions, i % 4, 4) if i else None for i, actions in enumerate(rows)]
    mixed = bits(actor.act_guided(observations, keys, committed))
    for i in range(7):
        (one,) = bits(actor.act_guided([observations[i]], [keys[i]], [committed[i]]))
        assert one == mixed[i]
