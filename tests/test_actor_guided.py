"""A policy that continues a chunk: real units in, and nobody else's answer changes."""

import dataclasses

import numpy as np
import pytest

from tests.test_actor import bits, inputs, make_actor
from vlafit.types import ActionChunk, Committed, Guidance


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
