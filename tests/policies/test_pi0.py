"""The network: against the naive joint attention, and every promise of the two-pass form."""

import re
from dataclasses import replace

import pytest
import torch

from tests.policies import reference
from tests.policies.tiny import CLOSE, ROUNDINGS, random_batch, random_draws, random_policy
from tests.rounding import drift, unit_roundoff
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import Batch, unit_images
from vlafit.policies import build_family, families, family, family_name, override
from vlafit.policies.pi0 import SIZES, Pi0, build, init_weights

TINY = ("pi0-tiny", "pi05-tiny")


@pytest.fixture(params=TINY)
def policy(request: pytest.FixtureRequest) -> Pi0:
    return random_policy(request.param)


def grouped(size: str, kv_heads: int) -> Pi0:
    config = SIZES[size]
    return random_policy(replace(config, language=replace(config.language, kv_heads=kv_heads)))


@pytest.mark.parity
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", TINY)
def test_two_passes_equal_one_joint_attention_written_out_naively(size: str, kv_heads: int):
    policy = grouped(size, kv_heads)
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config, draws=1)
    expected = reference.velocity(policy, batch, noise[0], time[0])
    with torch.no_grad():
        got = policy.velocity(batch, noise[0], time[0])
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("size", TINY)
def test_draws_that_share_a_prefix_equal_separate_calls(size: str, kv_heads: int):
    policy = grouped(size, kv_heads)
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    together = policy.velocity(batch, noise, time)
    apart = torch.stack([policy.velocity(batch, n, t) for n, t in zip(noise, time, strict=True)])
    assert together.shape == noise.shape
    torch.testing.assert_close(together, apart, **CLOSE)


def test_gradients_of_shared_draws_are_the_mean_of_separate_ones(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    policy.flow_loss(batch, noise, time)["loss"].backward()
    together = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for n, t in zip(noise, time, strict=True):
        (policy.flow_loss(batch, n, t)["loss"] / len(noise)).backward()
    # Forward, backward to inputs and backward to weights: 1.3e-5 of the largest gradient, which is 0.35.
    largest = max(float(gradient.abs().max()) for gradient in together.values())
    bound = min(drift(unit_roundoff(torch.float32), 3 * ROUNDINGS, largest), 1e-5)
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=bound, rtol=0)


def test_missing_cameras_and_padding_may_be_dropped_or_masked_alike(policy: Pi0):
    batch = random_batch(policy.config, rows=4, length=12)
    batch.image_mask[:, 1] = False
    batch.token_mask[:, 6:] = False
    noise, time = random_draws(policy.config, rows=4, draws=2)
    trimmed = batch.trim(multiple=4)
    assert trimmed.images.shape[1] == 1
    assert trimmed.tokens.shape[1] == 8
    expected = policy.velocity(batch, noise, time)
    torch.testing.assert_close(policy.velocity(trimmed, noise, time), expected, **CLOSE)


def test_what_is_masked_has_no_influence(policy: Pi0):
    batch = random_batch(policy.config)
    other = replace(batch, images=batch.images.clone(), tokens=batch.tokens.clone())
    other.images[0, 1] = 255 - other.images[0, 1]
    other.tokens[~other.token_mask] = 7
    noise, time = random_draws(policy.config)
    assert torch.equal(policy.velocity(batch, noise, time), policy.velocity(other, noise, time))


def test_what_is_no_number_has_no_influence_where_it_is_masked(policy: Pi0):
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


def test_rows_of_a_padded_batch_equal_the_same_rows_alone_and_unpadded(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config, draws=1)
    together = policy.velocity(batch, noise[0], time[0])
    for i in range(len(batch)):
        cameras, used = int(batch.image_mask[i].sum()), int(batch.token_mask[i].sum())
        alone = Batch(
            images=batch.images[i : i + 1, :cameras],
            image_mask=batch.image_mask[i : i + 1, :cameras],
            tokens=batch.tokens[i : i + 1, :used],
            token_mask=batch.token_mask[i : i + 1, :used],
            state=batch.state[i : i + 1],
            actions=None if batch.actions is None else batch.actions[i : i + 1],
        )
        got = policy.velocity(alone, noise[0][i : i + 1], time[0][i : i + 1])
        torch.testing.assert_close(got[0], together[i], **CLOSE)


def test_sampling_with_one_prefix_equals_encoding_it_anew_for_every_step(policy: Pi0):
    batch = random_batch(policy.config)
    noise, _ = random_draws(policy.config, draws=1)
    x = noise[0]
    for step in range(10):
        t = torch.full((len(batch),), 1 - step / 10)
        # x_t = t * noise + (1 - t) * actions holds for any x_t when noise and actions both are x_t
        with torch.no_grad():
            x = x - policy.velocity(replace(batch, actions=x), x, t) / 10
    torch.testing.assert_close(policy.sample(batch, noise[0]), x, **CLOSE)


def test_acting_needs_no_actions_and_a_row_does_not_depend_on_the_other_rows(policy: Pi0):
    batch = random_batch(policy.config, rows=4)
    noise, _ = random_draws(policy.config, rows=4, draws=1)
    actions = policy.sample(replace(batch, actions=None), noise[0], steps=3)
    full = replace(
        batch, actions=None, image_mask=batch.image_mask.clone(), token_mask=batch.token_mask.clone()
    )
    full.image_mask[1:], full.token_mask[1:] = True, True
    full.images = full.images.clone()
    full.images[1:] = 0
    assert torch.equal(policy.sample(full, noise[0], steps=3)[0], actions[0])
    assert not actions.requires_grad


def test_with_an_all_true_mask_the_loss_is_the_plain_mean(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    assert batch.actions is not None
    expected = (noise - batch.actions - policy.velocity(batch, noise, time)).square().mean()
    for mask in (None, torch.ones_like(batch.actions, dtype=torch.bool)):
        got = policy.flow_loss(replace(batch, action_mask=mask), noise, time)
        # 240 squares, summed in another order: sqrt(240) * 2^-24 = 9e-7 of the loss.
        torch.testing.assert_close(got["loss"], expected, atol=0, rtol=1e-6)
        assert got["mask_sum"] == noise.numel()
        torch.testing.assert_close(got["error_sum"] / got["mask_sum"], got["loss"], atol=0, rtol=1e-6)


def test_targets_under_a_false_mask_do_not_influence_the_loss(policy: Pi0):
    batch = random_batch(policy.config)
    assert batch.actions is not None
    mask = torch.rand(batch.actions.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    noise, time = random_draws(policy.config)
    before = policy.flow_loss(replace(batch, action_mask=mask), noise, time)
    # Move actions (by up to 500, where 1 - t is 0.01) and noise such that x_t stays, and with it what the
    # network sees; only targets change.
    t = time[..., None, None]
    moved = noise + torch.where(mask, 0.0, 5.0)
    actions = batch.actions - torch.where(mask, 0.0, 5.0) * t / (1 - t)
    for k in range(len(noise)):
        one = replace(batch, action_mask=mask)
        other = replace(batch, actions=actions[k], action_mask=mask)
        a = policy.flow_loss(one, noise[k], time[k])["error_sum"]
        b = policy.flow_loss(other, moved[k], time[k])["error_sum"]
        # x_t rounds by (0.01 * 500 + 9) * 2^-24 = 8e-7; 60 squares of up to 3^2 move by 2 * 3 * 8e-7 each.
        torch.testing.assert_close(a, b, atol=3e-4, rtol=0)
    assert before["mask_sum"] == mask.sum() * len(noise)


def test_an_empty_mask_gives_zero_and_not_nan(policy: Pi0):
    batch = random_batch(policy.config)
    assert batch.actions is not None
    noise, time = random_draws(policy.config)
    out = policy.flow_loss(
        replace(batch, action_mask=torch.zeros_like(batch.actions, dtype=torch.bool)), noise, time
    )
    assert float(out["loss"].detach()) == 0.0


def test_every_parameter_is_described_exactly_once(policy: Pi0):
    infos = policy.parts()
    assert [i.name for i in infos] == [n for n, _ in policy.named_parameters()]
    parts = {i.part for i in infos}
    assert parts == {"vision", "projector", "language", "expert", "projections"}
    assert {i.kind for i in infos} == {"attention", "mlp", "norm", "embedding", "conv", "linear"}
    for info in infos:
        number = re.search(r"layers\.(\d+)\.", info.name)
        assert info.layer == (int(number[1]) if number else None)
        if info.layer is not None:
            assert info.layers == (2 if info.part == "vision" else 3)
    by_name = {i.name: i for i in infos}
    assert by_name["vision.position_embedding.weight"].kind == "embedding"
    assert by_name["vision.post_layernorm.bias"].kind == "norm"
    assert by_name["language.layers.1.mlp.up_proj.weight"].kind == "mlp"
    norm = "expert.norm.dense.bias" if policy.config.pi05 else "expert.norm.weight"
    assert by_name[norm].kind == "norm"
    assert by_name["action_in_proj.weight"].part == "projections"


def test_dead_parameters_get_no_gradient_and_all_others_do(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    policy.flow_loss(batch, noise, time)["loss"].backward()
    dead = {i.name for i in policy.parts() if i.dead}
    assert dead == {
        "language.norm.weight",
        "language.layers.2.post_attention_layernorm.weight",
        *(f"language.layers.2.self_attn.{n}_proj.weight" for n in "qo"),
        *(f"language.layers.2.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    for name, parameter in policy.named_parameters():
        if name in dead:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_prefix_with_nothing_trainable_keeps_nothing_for_backward_and_changes_nothing(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    expected = policy.flow_loss(batch, noise, time)["loss"].detach()
    for module in (policy.vision, policy.projector, policy.language):
        module.requires_grad_(False)
    loss = policy.flow_loss(batch, noise, time)["loss"]
    assert torch.equal(loss.detach(), expected)
    assert not any(k.requires_grad or v.requires_grad for k, v in policy.encode_prefix(batch).layers)
    loss.backward()
    assert all(
        (p.grad is None) == n.startswith(("vision", "projector", "language"))
        for n, p in policy.named_parameters()
    )
    policy.language.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    assert policy.encode_prefix(batch).layers[0][0].requires_grad


def test_under_bfloat16_autocast_the_velocity_stays_near_and_float32(policy: Pi0):
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    with torch.no_grad():
        exact = policy.velocity(batch, noise, time)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = policy.velocity(batch, noise, time)
    assert near.dtype == torch.float32
    # 8 * 4 products round input, weight and output by 2^-9 / sqrt(3): sqrt(96) * 1.1e-3 = 1.1e-2, or 1.2e-4
    # in squares; `drift` allows 12 times that, so 1e-3 is the stricter bound.
    assert (near - exact).square().mean() < 1e-3 * exact.square().mean()


def test_fresh_weights_follow_the_generator_and_nothing_else():
    config = SIZES["pi05-tiny"]
    torch.manual_seed(1)
    one = build(config, "cpu", torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(2)
    other = build(config, "cpu", torch.Generator().manual_seed(5)).state_dict()
    third = build(config, "cpu", torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert any(not torch.equal(one[n], third[n]) for n in one)


def test_a_fresh_policy_predicts_small_velocities_and_every_live_layer_can_learn():
    policy = build(SIZES["pi0-tiny"], "cpu")
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    assert policy.velocity(batch, noise, time).abs().mean() < 0.3
    policy.flow_loss(batch, noise, time)["loss"].backward()
    assert all(i.dead or policy.get_parameter(i.name).grad.abs().max() > 0 for i in policy.parts())


def test_fresh_parts_are_drawn_and_the_rest_left_alone():
    policy = random_policy("pi0-tiny")
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    drawn = init_weights(policy, torch.Generator().manual_seed(9), ("expert", "action_*"))
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(drawn)
    assert changed == {n for n in before if n.startswith(("expert.", "action_"))}
    with pytest.raises(ConfigError, match=r"'expret'.*\(expert, language"):
        init_weights(policy, torch.Generator(), ("expret",))


@pytest.mark.parametrize(("size", "count"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872)])
def test_the_public_sizes_have_the_published_number_of_parameters(size: str, count: int):
    assert sum(p.numel() for p in build(SIZES[size], "meta").parameters()) == count


def test_a_policy_says_what_it_needs_of_a_codec():
    needs = random_policy("pi05-tiny").needs()
    assert (needs.prompt, needs.chunk, needs.vocabulary) == ("pi05", 4, 300)
    silent = build(replace(SIZES["pi05-tiny"], state_input="none"), "meta")
    assert silent.needs().prompt == "pi0"


BAD_BATCHES = {
    "images of another size": (
        "images",
        lambda b: b.images[..., :4],
        r"batch.images has shape .* \(3, 2, 3, 8, 8\)",
    ),
    "a mask for other cameras": ("image_mask", lambda b: b.image_mask[:, :1], r"batch.images has shape"),
    "prompt and mask that differ": (
        "token_mask",
        lambda b: b.token_mask[:, :-1],
        r"batch.token_mask has shape",
    ),
    "an unpadded state": ("state", lambda b: b.state[:, :3], r"batch.state has shape \(3, 3\).*\(3, 6\)"),
    "a longer chunk": (
        "actions",
        lambda b: b.actions.repeat(1, 2, 1),
        r"batch.actions has shape \(3, 8, 5\)",
    ),
    "no actions": ("actions", lambda b: None, r"no actions"),
    "a foreign tokenizer": ("tokens", lambda b: b.tokens + 300, r"this policy knows 0 to 299"),
    "a mask by step alone": (
        "action_mask",
        lambda b: torch.ones(3, 4, dtype=torch.bool),
        r"batch.action_mask",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused_by_the_field(case: str):
    policy = random_policy("pi0-tiny")
    field, change, message = BAD_BATCHES[case]
    batch = random_batch(policy.config)
    setattr(batch, field, change(batch))
    noise, time = random_draws(policy.config)
    with pytest.raises(CodecError, match=message):
        policy.flow_loss(batch, noise, time)


def test_noise_time_and_steps_that_do_not_fit_are_refused():
    policy = random_policy("pi0-tiny")
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    with pytest.raises(CodecError, match=r"noise.*\(4, 3, 3, 5\)"):
        policy.flow_loss(batch, noise[:, :, :3], time)
    with pytest.raises(CodecError, match=r"time has shape \(3,\).*\(4, 3\)"):
        policy.flow_loss(batch, noise, time[0])
    with pytest.raises(CodecError, match="at least 1 step"):
        policy.sample(batch, noise[0], steps=0)


BAD_CONFIGS = {
    "a patch that does not divide": ({"vision.patch": 3}, "not a multiple of patch 3"),
    "odd head_dim": ({"language.head_dim": 7}, "language.head_dim 7 is odd"),
    "groups that do not divide": ({"language": {"kv_heads": 3}}, "not? a? ?multiple of language.kv_heads 3"),
    "a state token for pi0.5": ({"pi05": True}, "'continuous'.* does not go with pi05"),
    "no chunk": ({"chunk": 0}, "chunk is 0; it must be at least 1"),
    "a misspelt key": ({"visoin.heads": 2}, "unknown key 'visoin'; did you mean 'vision'"),
    "a wrong type": ({"chunk": "four"}, "chunk"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be_is_refused(case: str):
    values, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        override(SIZES["pi0-tiny"], values, "here")


def test_families_are_found_by_name_or_dotted_path():
    assert "pi0" in families()
    assert family("pi0") is family("vlafit.policies.pi0")
    assert family_name(build(SIZES["pi0-tiny"])) == "pi0"
    policy = build_family("pi0", "pi0-tiny", {"vision.depth": 1, "chunk": 7})
    assert (policy.config.vision.depth, policy.config.chunk) == (1, 7)
    with pytest.raises(ConfigError, match="family 'pi1'.*'pi0'"):
        build_family("pi1", "pi0-tiny")
    with pytest.raises(ConfigError, match="size 'pi0-tine'.*'pi0-tiny'"):
        build_family("pi0", "pi0-tine")
    with pytest.raises(ConfigError, match="does not define Config, SIZES"):
        build_family("vlafit.errors")
    with pytest.raises(ConfigError, match="missing key"):
        build_family("pi0", config={"chunk": 3})


def test_what_is_fitted_to_data_is_normalised_as_openpi_does_for_each_model():
    wanted = {size: "quantile" if config.pi05 else "mean_std" for size, config in SIZES.items()}
    assert {size: build(config, "meta").needs().normalisation for size, config in SIZES.items()} == wanted
