"""ACT against what LeRobot recorded, and what its loss and its latent promise."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlafit
from vlafit import shipped
from vlafit.errors import CodecError, ConfigError, StrategyError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Needs, mean_loss
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import SampleRng, sample_rng
from vlafit.policies import act
from vlafit.policies._common import PIXEL_MEAN, PIXEL_STD
from vlafit.tuning import apply, load_strategy, preview

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_act"
CONFIG = act.ActConfig(
    image_size=64, state_dim=7, action_dim=6, chunk=10, resnet_width=8, width=32, heads=4, mlp=64,
    encoder_layers=2, vae_layers=2, latent=8, dropout=0.0,
)  # fmt: skip
TINY = act.SIZES["act-tiny"]
# The recorded numbers are float32 of another CPU and torch. 17 convolutions and 16 other products in a row
# sum up to 9 * 64 terms: 2 * 2^-24 * sqrt(33 * 576) = 1.6e-5 (tests/rounding.py), so 1e-5 is the stricter
# bound. Gradients pass the network three times; they have the 1e-4 of all parity tests.
RECORDED = {"rtol": 1e-5, "atol": 1e-5}
RENAMED = (
    (r"^backbone\.layer(\d)", lambda m: f"vision.layers.{int(m[1]) - 1}"),
    (r"^backbone\.", "vision."),
    (r"bn(\d)\.", r"norm\1."),
    (r"downsample", "shortcut"),
    (r"^vae_encoder\.layers", "vae.layers"),
    (r"^vae_encoder_cls_embed", "vae.cls_embedding"),
    (r"^vae_encoder_robot_state_input_proj", "vae.state_proj"),
    (r"^vae_encoder_action_input_proj", "vae.action_proj"),
    (r"^vae_encoder_latent_output_proj", "vae.latent_proj"),
    (r"^encoder_robot_state_input_proj", "state_proj"),
    (r"^encoder_latent_input_proj", "latent_proj"),
    (r"^encoder_img_feat_input_proj", "image_proj"),
    (r"^encoder_1d_feature_pos_embed", "token_embedding"),
    (r"^decoder_pos_embed", "decoder.query_embedding"),
    (r"^action_head", "action_out_proj"),
    (r"multihead_attn", "cross_attn"),
    (r"linear1", "mlp.fc1"),
    (r"linear2", "mlp.fc2"),
)


def renamed(name: str) -> str:
    name = name.removeprefix("model.")
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """LeRobot's tensors under our names; packed projections of attention are taken apart."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith("vae_encoder_pos_enc"):
            continue  # a constant, which the policy computes
        packed = re.search(r"in_proj_(weight|bias)$", name)
        for letter, part in zip("qkv", tensor.chunk(3), strict=True) if packed else [("", tensor)]:
            own = renamed(re.sub(r"in_proj_", f"{letter}_proj.", name) if packed else name)
            ours[own] = part
    return ours


def loaded(variant: str = "") -> tuple[act.Act, dict[str, Tensor], dict[str, float]]:
    """The recorded policy, inputs and outputs, and numbers."""
    folder = FIXTURE / variant
    policy = act.build(replace(CONFIG, vae=not variant), "cpu")
    weights = translated(load_file(folder / "model.safetensors"))
    assert set(weights) == {name for name, _ in policy.named_parameters()}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights[name])
    io = load_file(FIXTURE / "io.safetensors") | load_file(folder / "io.safetensors")
    return policy, io, json.loads((folder / "numbers.json").read_text())


class Recorded:
    """Stands in for a generator: returns numbers that were written down."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.numpy()

    def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return self.values.reshape(shape).astype(dtype)


def recorded_batch(io: dict[str, Tensor], masked: bool = True) -> Batch:
    """The recorded inputs as a batch; its images are floats from before the normalisation by ImageNet's."""
    images = torch.stack([io["raw.observation.images.cam_high"], io["raw.observation.images.cam_wrist"]], 1)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    images = ((images.double() * std + mean) * 2 - 1).float()
    mask = ~io["raw.action_is_pad"][..., None].expand(-1, -1, 6)
    return Batch(
        images=images,
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        state=io["raw.observation.state"],
        actions=io["raw.action"],
        action_mask=mask.clone() if masked else torch.ones_like(mask),
    )


def recorded_rng(io: dict[str, Tensor]) -> SampleRng:
    return SampleRng([Recorded(row) for row in io["raw.eps"]])  # type: ignore[list-item]


class Wide(act.Act):
    """Takes the recorded images, which are not square."""

    def check(self, batch: Batch) -> None:
        return None


def loss_of(policy: act.Act, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, float]]:
    """The loss as the trainer makes it, and the mean of each term."""
    policy.__class__ = Wide
    sums, counts = policy.loss(batch, rng), policy.counts(batch, rng.draws)
    loss = sum((f * sums[name] / counts[name] for name, f in policy.terms().items()), torch.zeros(()))
    return loss, {name: value.item() / counts[name] for name, value in sums.items()}


@pytest.mark.parametrize("variant", ["", "novae"])
def test_loss_terms_and_gradients_are_those_that_lerobot_recorded(variant: str):
    policy, io, numbers = loaded(variant)
    policy.train()
    loss, means = loss_of(policy, recorded_batch(io), recorded_rng(io))
    loss.backward()
    torch.testing.assert_close(loss, io["out.loss"], **RECORDED)
    assert means["l1"] == pytest.approx(numbers["train.l1_loss"], rel=1e-5)
    if not variant:
        assert means["kl"] == pytest.approx(numbers["train.kld_loss"], rel=1e-5)
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert set(gradients) >= {info.name for info in policy.parts() if not info.dead}
    always_zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert always_zero == {act.UNREACHED, *([act.LATENT] if variant else [])}
    assert always_zero <= {info.name for info in policy.parts() if info.dead}
    norms = {name: value for name, value in numbers.items() if name.startswith("gradnorm.")}
    for name, norm in norms.items():
        name = name.removeprefix("gradnorm.")
        letters = "qkv" if "in_proj_" in name else [""]
        own = [gradients[renamed(re.sub(r"in_proj_", f"{letter}_proj.", name))] for letter in letters]
        got = torch.stack([g.double().square().sum() for g in own]).sum().sqrt()
        assert float(got) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    for name in ("action_head.weight", "backbone.conv1.weight", "encoder_latent_input_proj.weight"):
        torch.testing.assert_close(gradients[renamed(name)], io[f"grad.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["", "novae"])
def test_without_padding_and_in_evaluation_mode_the_loss_is_the_recorded_one(variant: str):
    policy, io, _ = loaded(variant)
    loss, _ = loss_of(policy.train(), recorded_batch(io, masked=False), recorded_rng(io))
    torch.testing.assert_close(loss, io["out.loss_no_pad"], **RECORDED)
    loss, _ = loss_of(policy.eval(), recorded_batch(io), recorded_rng(io))
    torch.testing.assert_close(loss, io["out.loss_eval"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["", "novae"])
def test_predicted_chunks_are_those_that_lerobot_recorded(variant: str):
    policy, io, _ = loaded(variant)
    policy.__class__ = Wide
    actions = policy.eval().act(recorded_batch(io), sample_rng([(0, 0), (0, 1)], seed=0))
    torch.testing.assert_close(actions, io["out.predict_action_chunk"], **RECORDED)


def test_three_steps_of_adamw_follow_the_recorded_curve():
    policy, io, numbers = loaded()
    policy.train()
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4
    )
    for step in range(4):
        loss, _ = loss_of(policy, recorded_batch(io), recorded_rng(io))
        # Each of 4 steps adds the 1.6e-5 of a loss, and Adam's sign for gradients that are rounding itself.
        assert loss.item() == pytest.approx(numbers[f"curve.{step}"], rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batch_for(needs: Needs, rows: int = 3) -> Batch:
    return random_batch(needs, rows)


def test_the_loss_over_micro_batches_is_that_of_the_whole_batch():
    policy = act.build(replace(TINY, dropout=0.0), "cpu").train()
    batch = batch_for(policy.needs(), 4)
    assert batch.action_mask is not None
    batch.action_mask[0, 2:] = False  # the micro-batches count differently
    keys = [(0, i) for i in range(4)]

    def sums_and_counts(rows: slice) -> tuple[dict[str, float], dict[str, float]]:
        part = replace(batch, **{name: value[rows] for name, value in batch.present().items()})
        sums = policy.loss(part, sample_rng(keys[rows], seed=0, draws=2))
        return {n: v.item() for n, v in sums.items()}, policy.counts(part, 2)

    whole = mean_loss(policy.terms(), *sums_and_counts(slice(0, 4)))
    one, other = sums_and_counts(slice(0, 1)), sums_and_counts(slice(1, 4))
    sums, counts = ({n: a[n] + b[n] for n in a} for a, b in zip(one, other, strict=True))
    # Kernels for other batch sizes sum in another order; the path of 33 products allows 1.6e-5 (RECORDED).
    assert mean_loss(policy.terms(), sums, counts) == pytest.approx(whole, rel=1e-5)


def test_what_is_masked_changes_neither_loss_nor_latent():
    policy = act.build(replace(TINY, dropout=0.0), "cpu").train()
    batch = batch_for(policy.needs())
    assert batch.actions is not None and batch.action_mask is not None
    batch.action_mask[:, -1] = False
    batch.image_mask[:, 1] = False
    before = policy.loss(batch, sample_rng([(0, i) for i in range(3)], seed=0))
    batch.actions[:, -1] = float("nan")
    batch.images[:, 1] = float("nan")
    after = policy.loss(batch, sample_rng([(0, i) for i in range(3)], seed=0))
    for name in ("l1", "kl"):
        assert after[name].equal(before[name])


def test_acting_draws_nothing_and_needs_neither_actions_nor_words():
    policy = act.build(TINY, "cpu").eval()
    batch = replace(batch_for(policy.needs()), actions=None, action_mask=None)
    assert batch.tokens is None and policy.needs().prompt is None
    one, other = (policy.act(batch, sample_rng([(0, i) for i in range(3)], seed=seed)) for seed in (0, 1))
    assert one.shape == (3, TINY.chunk, TINY.action_dim) and one.equal(other)


def test_the_parts_are_those_that_strategies_select_and_frozen_norms_never_learn():
    policy = act.build(TINY)
    infos = policy.parts()
    assert {info.part for info in infos} == {"vision", "encoder", "decoder", "vae", "projections"}
    assert {info.kind for info in infos} == {"attention", "mlp", "norm", "embedding", "conv", "linear"}
    dead = {info.name for info in infos if info.dead}
    assert all("norm" in name or "shortcut.1" in name for name in dead - {act.UNREACHED})
    grouped = act.build(replace(TINY, resnet_norm="group"))
    assert len(dead) > 4 and [info.name for info in grouped.parts() if info.dead] == [act.UNREACHED]
    without = act.build(replace(TINY, resnet_norm="group", vae=False))
    assert {info.name for info in without.parts() if info.dead} == {act.UNREACHED, act.LATENT}


def test_fresh_weights_are_those_of_the_seed_and_parts_can_be_drawn_anew():
    one, other = act.build(TINY, "cpu"), act.build(TINY, "cpu")
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(p.isfinite().all() for p in one.parameters())
    drawn = act.init_weights(other, torch.Generator().manual_seed(1), ["decoder"])
    assert drawn and all(name.startswith("decoder.") for name in drawn)
    changed = {n for n, p in other.named_parameters() if not p.equal(one.get_parameter(n))}
    assert changed and changed <= set(drawn)


def test_a_saved_policy_loads_bit_for_bit(tmp_path: Path):
    policy = act.build(TINY, "cpu").eval()
    vlafit.save_checkpoint(policy, tmp_path / "saved")
    again = vlafit.load_policy(tmp_path / "saved")
    batch, keys = batch_for(policy.needs()), [(0, i) for i in range(3)]
    assert (
        again.eval().act(batch, sample_rng(keys, seed=0)).equal(policy.act(batch, sample_rng(keys, seed=0)))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 16 .* heads 3"),
        ({"chunk": 0}, "chunk is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_a_batch_of_another_size_is_refused_by_its_field():
    policy = act.build(TINY, "cpu")
    batch = batch_for(policy.needs())
    with pytest.raises(CodecError, match="batch.state has shape"):
        policy.loss(replace(batch, state=batch.state[:, :2]), sample_rng([(0, i) for i in range(3)], seed=0))


@pytest.mark.parametrize("name", shipped.names("strategy"))
def test_a_shipped_strategy_trains_something_or_names_the_part_that_act_lacks(name: str):
    policy = act.build(TINY)
    try:
        plan = preview(policy, load_strategy(name))
    except StrategyError as error:
        said = str(error)
        assert "no prefix" in said or (re.search(r"\b(language|expert)\b", said) and "decoder" in said), said
    else:
        assert plan.trainable and not any(e.trainable and e.dead for e in plan.entries)


def test_lora_on_every_layer_changes_nothing_until_it_learns_and_merges_back():
    policy = act.build(TINY, "cpu").eval()
    batch, rng = batch_for(policy.needs()), sample_rng([(0, i) for i in range(3)], seed=0)
    before = policy.act(batch, rng)
    apply(policy, load_strategy("lora-all"), probe=lambda: policy.eval().act(batch, rng))
    assert policy.act(batch, rng).equal(before)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted = policy.act(batch, rng)
    assert (adapted - before).abs().max() > 1e-3
    # A layer and its adapter round 4 times where the path (RECORDED) rounds once: 2 * 1.6e-5 = 3.2e-5.
    torch.testing.assert_close(vlafit.merge(policy).act(batch, rng), adapted, rtol=3.2e-5, atol=1e-5)
