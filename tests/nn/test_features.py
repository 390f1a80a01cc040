"""A policy computes the same from kept features of its frozen modules as from images and prompt."""

from dataclasses import replace

import pytest
import torch

from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family
from vlafit.train.feature_cache import FeatureCache
from vlafit.train.feature_storage import MemoryStorage

ROWS = 3
CPU = torch.device("cpu")
FAMILIES = {"pi0": ("pi0", "pi0-tiny"), "pi0.5": ("pi0", "pi05-tiny"), "SmolVLA": ("smolvla", "smolvla-tiny")}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    family, size = FAMILIES[request.param]
    return build_family(family, size, {}, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixed(policy: Policy) -> Batch:
    """Samples with one or two cameras, and prompts of several lengths, one with a gap."""
    batch = random_batch(policy.needs(), ROWS)
    assert batch.token_mask is not None
    batch.image_mask[0, 1] = False
    batch.token_mask[1, 5:] = False
    batch.token_mask[2, 2] = False
    return batch


def cache_of(policy: Policy, kind: str) -> FeatureCache:
    (cacheable,) = [c for c in policy.cacheable() if c.kind == kind]
    return FeatureCache(policy, cacheable, MemoryStorage(), CPU)


def loss_of(policy: Policy, batch: Batch) -> float:
    rng = sample_rng([(0, row) for row in range(len(batch))], seed=1, draws=2)
    return float(policy.loss(batch.to("cpu"), rng)["error"].detach())


@pytest.mark.parametrize("kind", ["prefix", "vision"])
@pytest.mark.parametrize("rows", [slice(0, ROWS), slice(1, ROWS), slice(0, 1)], ids=["mixed", "two", "one"])
def test_the_loss_from_kept_features_is_that_from_images(
    policy: Policy, mixed: Batch, kind: str, rows: slice
) -> None:
    values = {name: value[rows] for name, value in mixed.present().items()}
    batch, cache = replace(mixed, **values), cache_of(policy, kind)
    expected = loss_of(policy, batch.trim())
    for _ in range(2):  # computed, then kept
        assert loss_of(policy, cache.attach(batch, batch.trim())) == pytest.approx(expected, rel=1e-6)
    assert (cache.computed, cache.read) == (len(batch), len(batch))


@pytest.mark.parametrize("kind", ["prefix", "vision"])
def test_actions_from_kept_features_are_those_from_images(policy: Policy, mixed: Batch, kind: str) -> None:
    trimmed, keys = mixed.trim(), [(0, row) for row in range(ROWS)]
    attached = cache_of(policy, kind).attach(mixed, trimmed)
    expected = policy.act(trimmed.to("cpu"), sample_rng(keys, seed=1))
    actions = policy.act(attached.to("cpu"), sample_rng(keys, seed=1))
    assert torch.allclose(actions, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "vision"])
def test_gradients_of_what_is_trained_are_the_same(policy: Policy, mixed: Batch, kind: str) -> None:
    (cacheable,) = [c for c in policy.cacheable() if c.kind == kind]
    frozen = [parameter for module in cacheable.modules for parameter in module.parameters()]
    gradients = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for batch in (mixed.trim(), cache_of(policy, kind).attach(mixed, mixed.trim())):
            policy.zero_grad()
            policy(batch.to("cpu"), sample_rng([(0, row) for row in range(ROWS)], seed=1))["error"].backward()
            gradients.append(
                {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
            )
    finally:
        policy.requires_grad_(True)
        policy.zero_grad()
    images, kept = gradients
    assert set(images) == set(kept) and any(name.startswith("expert.") for name in kept)
    for name, gradient in images.items():
        assert torch.allclose(kept[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_features_of_a_sample_do_not_depend_on_the_batch_that_first_needs_them(
    policy: Policy, mixed: Batch
) -> None:
    first, second = cache_of(policy, "prefix"), cache_of(policy, "prefix")
    together = first.attach(mixed, mixed.trim()).features
    for row in reversed(range(ROWS)):
        single = replace(mixed, **{name: value[row : row + 1] for name, value in mixed.present().items()})
        second.attach(single, single.trim())
    again = second.attach(mixed, mixed.trim()).features
    assert together is not None and again is not None
    assert second.computed == ROWS
    assert all(a.equal(b) for a, b in zip(together.tensors, again.tensors, strict=True))


def test_padded_pixels_of_missing_cameras_and_words_of_padding_are_no_part_of_the_features(
    policy: Policy, mixed: Batch
) -> None:
    features = cache_of(policy, "prefix").attach(mixed, mixed.trim()).features
    assert features is not None and features.valid is not None
    tokens = mixed.token_mask
    assert tokens is not None
    per_camera = (features.valid.sum(1) - tokens.sum(1)) // mixed.image_mask.sum(1)
    assert per_camera.unique().numel() == 1  # each camera that is there has the same number of tokens


def test_a_batch_with_features_holds_no_pixels(policy: Policy, mixed: Batch) -> None:
    attached = cache_of(policy, "prefix").attach(mixed, mixed.trim()).to("cpu")
    assert attached.images.shape == mixed.images.shape
    assert attached.images.untyped_storage().nbytes() == 1


def test_a_family_without_features_declares_none() -> None:
    assert not build_family("act", "act-tiny", {}, device="meta").cacheable()
