"""SmolVLA's promises of the two-pass form; its numbers are held to LeRobot's with the checkpoints."""

from dataclasses import replace

import pytest
import torch

from tests.policies.tiny import CLOSE, random_batch, random_draws, random_policy
from vlafit.errors import ConfigError
from vlafit.nn.batch import unit_images
from vlafit.nn.smolvlm import patch_positions
from vlafit.policies import override
from vlafit.policies.smolvla import SIZES, SmolVLA, SmolVLAConfig, build

TINY = SIZES["smolvla-tiny"]


@pytest.fixture(params=[0, 1, 2, 3])
def policy(request: pytest.FixtureRequest) -> SmolVLA:
    """Every way of mixing self and cross layers."""
    return random_policy(replace(TINY, expert=replace(TINY.expert, self_every=request.param)))


def test_draws_that_share_a_prefix_equal_separate_calls(policy: SmolVLA):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    together = policy.velocity(batch, noise, time)
    apart = torch.stack([policy.velocity(batch, n, t) for n, t in zip(noise, time, strict=True)])
    torch.testing.assert_close(together, apart, **CLOSE)


def test_missing_cameras_and_padding_may_be_dropped_or_masked_alike(policy: SmolVLA):
    batch = random_batch(policy.config, rows=4, length=12)
    batch.image_mask[:, 1] = False
    batch.token_mask[:, 6:] = False
    noise, time = random_draws(policy.config, rows=4, draws=2)
    trimmed = batch.trim(multiple=4)
    assert (trimmed.images.shape[1], trimmed.tokens.shape[1]) == (1, 8)
    expected = policy.velocity(batch, noise, time)
    torch.testing.assert_close(policy.velocity(trimmed, noise, time), expected, **CLOSE)


def test_what_is_masked_has_no_influence(policy: SmolVLA):
    batch = random_batch(policy.config)
    other = replace(batch, images=batch.images.clone(), tokens=batch.tokens.clone())
    other.images[0, 1] = 255 - other.images[0, 1]
    other.tokens[~other.token_mask] = 7
    noise, time = random_draws(policy.config)
    assert torch.equal(policy.velocity(batch, noise, time), policy.velocity(other, noise, time))


def test_what_is_no_number_has_no_influence_where_it_is_masked(policy: SmolVLA):
    batch = random_batch(policy.config)
    batch.images = unit_images(batch.images)
    batch.action_mask = torch.ones_like(batch.actions, dtype=torch.bool)
    batch.action_mask[:, -1] = False
    batch.actions[:, -1] = 0.0
    noise, time = random_draws(policy.config)
    expected = policy.flow_loss(batch, noise, time)["loss"]
    acted = policy.sample(batch, noise[0], steps=2)
    batch.images[0, 1] = torch.nan  # row 0 lacks this camera
    batch.actions[0, -1], batch.actions[1, -1] = torch.nan, torch.inf
    loss = policy.flow_loss(batch, noise, time)["loss"]
    assert torch.equal(loss, expected)
    assert torch.equal(policy.sample(batch, noise[0], steps=2), acted)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in policy.parameters())
    batch.images[0, 0, 0, 0, 0] = torch.nan  # row 0 has this one
    assert policy.sample(batch, noise[0], steps=2)[0].isnan().all()


def test_sampling_with_one_prefix_equals_encoding_it_anew_for_every_step(policy: SmolVLA):
    batch = random_batch(policy.config)
    x = random_draws(policy.config, draws=1)[0][0]
    start = x
    for step in range(5):
        t = torch.full((len(batch),), 1 - step / 5)
        with torch.no_grad():
            x = x - policy.velocity(replace(batch, actions=x), x, t) / 5
    torch.testing.assert_close(policy.sample(batch, start, steps=5), x, **CLOSE)


@pytest.mark.parametrize("every", [1, 2])
def test_an_action_does_not_see_later_ones(every: int):
    policy = random_policy(replace(TINY, expert=replace(TINY.expert, self_every=every)))
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config, draws=1)
    other = noise.clone()
    other[:, :, 2] += 1.0
    one, two = (policy.velocity(batch, n[0], time[0]) for n in (noise, other))
    assert torch.equal(one[:, :2], two[:, :2])
    assert not torch.equal(one[:, 3:], two[:, 3:])


def test_every_live_layer_can_learn_and_the_dead_get_no_gradient():
    policy = build(TINY, "cpu")
    batch = random_batch(policy.config)
    policy.flow_loss(batch, *random_draws(policy.config))["loss"].backward()
    for info in policy.parts():
        gradient = policy.get_parameter(info.name).grad
        assert (gradient is None) == info.dead, info.name
        assert info.dead or gradient.abs().max() > 0, info.name


def test_a_frozen_backbone_gives_the_projections_of_the_state_the_same_gradient():
    policy = random_policy("smolvla-tiny")
    batch, draws = random_batch(policy.config), random_draws(policy.config)
    policy.flow_loss(batch, *draws)["loss"].backward()
    expected = policy.state_proj.weight.grad.clone()
    policy.zero_grad()
    for part in (policy.vision, policy.projector, policy.language):
        part.requires_grad_(False)
    policy.flow_loss(batch, *draws)["loss"].backward()
    # Forward and backward round as in test_pi0: 1.3e-5 of gradients of 2e-3 are 2.8e-8.
    torch.testing.assert_close(policy.state_proj.weight.grad, expected, atol=1e-7, rtol=1e-5)
    assert all(p.grad is None for p in policy.language.parameters())


@pytest.mark.parity
@pytest.mark.parametrize(("side", "table"), [(4, 4), (32, 32), (24, 32), (8, 4), (27, 27), (14, 16)])
def test_patches_take_the_positions_that_transformers_gives_them(side: int, table: int):
    transformers = pytest.importorskip("transformers", minversion="5.4")
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    config = transformers.SmolVLMVisionConfig(hidden_size=table**2, patch_size=2, image_size=2 * table)
    theirs = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        theirs.patch_embedding.weight.zero_()
        theirs.patch_embedding.bias.zero_()
        theirs.position_embedding.weight.copy_(torch.eye(table**2))
        out = theirs(torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
    assert torch.equal(out[0].argmax(-1), patch_positions(side, table))


def test_images_of_another_size_than_the_towers_work():
    policy = random_policy(replace(TINY, image_size=24))
    batch = random_batch(policy.config)
    side = (3, 2, 3, 24, 24)
    batch.images = torch.randint(0, 256, side, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert policy.velocity(batch, *random_draws(policy.config)).isfinite().all()


BAD_CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "an image that does not fold": ({"image_size": 20}, "image_size 20 is not a multiple of .* 8"),
    "a tower that does not divide": (
        {"vision.image_size": 18},
        "vision.image_size 18 is not a multiple of patch 4",
    ),
    "groups that do not divide": ({"language.kv_heads": 3}, "no multiple of language.kv_heads 3"),
    "odd heads": ({"language.head_dim": 7}, "language.head_dim 7 is odd"),
    "layers that are neither": ({"expert.self_every": -1}, "expert.self_every is -1"),
    "no chunk": ({"chunk": 0}, "chunk is 0"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be_is_refused(case: str):
    values, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        made = override(TINY, values, "here")
        assert isinstance(made, SmolVLAConfig)
