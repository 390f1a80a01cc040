"""X-VLA against what LeRobot recorded, and what its masks, domains and action spaces promise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlafit
from tests.variants import variants
from vlafit.checkpoints.formats.lerobot.names import XVLA as NAMES
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import mean_loss
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import _common, build_family, xvla
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.train.forecast import Workload, forecast
from vlafit.tuning import apply, load_strategy, preview

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_xvla"
CONFIG = xvla.XVLAConfig(
    xvla.VisionConfig(
        stage_width=(8, 16, 24, 32), stage_blocks=(1, 1, 2, 1), stage_heads=(2, 2, 3, 4),
        stage_groups=(2, 4, 3, 4), window=5, positions=6, frames=10,
    ),
    xvla.LanguageConfig(width=32, depth=2, mlp=48, heads=4, vocab=300, positions=64),
    xvla.ExpertConfig(width=32, depth=2, mlp=64, heads=4, time_dim=8, positions=64),
    image_size=64, views=3, state_dim=20, action_dim=20, chunk=8, max_tokens=12, domains=5, prompts=3,
)  # fmt: skip
LOSS = {"rel": 1e-6}  # of losses above 10
CLOSE = {"rtol": 0.0, "atol": 1e-4}


class Wide(xvla.XVLA):
    """Takes the recorded images, which are not square."""

    def check(self, batch: Batch) -> None:
        return None


def loaded(config: xvla.XVLAConfig = CONFIG) -> Wide:
    """The recorded policy in evaluation mode, in which all numbers were recorded."""
    policy = xvla.build(config, "cpu").eval()
    weights = load_file(FIXTURE / "model.safetensors")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights.pop(NAMES.file_name(name)).view_as(parameter))
    assert not weights
    policy.__class__ = Wide
    return policy  # type: ignore[return-value]


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture(scope="module")
def numbers() -> dict[str, float]:
    return json.loads((FIXTURE / "numbers.json").read_text())["numbers"]


@pytest.fixture(scope="module")
def policy() -> Wide:
    return loaded()


def recorded(io: dict[str, Tensor], cameras: tuple[str, ...] = ("image", "image2")) -> Batch:
    """The recorded inputs as a batch; its images are floats from before the normalisation by ImageNet's."""
    images = torch.stack([io[f"raw.observation.images.{name}"] for name in cameras], 1)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (_common.PIXEL_MEAN, _common.PIXEL_STD)
    )
    tokens = io["raw.observation.language.tokens"]
    return Batch(
        images=((images.double() * std + mean) * 2 - 1).float(),
        image_mask=torch.ones(images.shape[:2], dtype=torch.bool),
        state=io["raw.observation.state"],
        tokens=tokens,
        token_mask=tokens != 1,
        actions=io["raw.action"],
        embodiment_id=io["raw.domain_id"],
    )


def loss_of(policy: xvla.XVLA, batch: Batch, io: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss as the trainer makes it, and each term times its weight."""
    sums = policy.errors(batch, io["raw.noise"][:, None], io["out.time"][:, None])
    counts, weights = policy.counts(batch, 1), policy.terms()
    terms = {name: weights[name] * sums[name] / counts[name] for name in sums}
    return torch.stack(list(terms.values())).sum(), {name: term.item() for name, term in terms.items()}


# ------------------------------------------------------------------------------------------ what was recorded


def test_loss_terms_and_gradients_are_those_that_lerobot_recorded(io, numbers):
    policy = loaded()
    loss, terms = loss_of(policy, recorded(io), io)
    assert loss.item() == pytest.approx(numbers["loss.loss"], **LOSS)
    assert loss.item() == pytest.approx(io["out.loss"].item(), **LOSS)
    for name, parts in {"position": "xyz", "rotate6D": "rotation", "gripper": "gripper"}.items():
        mine = sum(value for term, value in terms.items() if term.startswith(parts))
        assert mine == pytest.approx(
            numbers[f"loss.{name}_loss"], rel=1e-6, abs=1e-4 if name != "position" else 0
        )
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    norms = {k.removeprefix("gradnorm."): v for k, v in numbers.items() if k.startswith("gradnorm.")}
    known = {NAMES.file_name(name): gradient for name, gradient in gradients.items()}
    shared = "model.vlm.language_model.shared.weight"
    known[shared] = known["model.vlm.language_model.encoder.embed_tokens.weight"]
    assert set(norms) <= set(known)
    for name, norm in norms.items():
        # A softmax does not see a constant in its scores: the gradient of a key's bias is rounding only, of
        # terms as large as the query's.
        is_key = name.endswith("k_proj.bias")
        rounding = 1e-6 * (norms[name.replace("k_proj", "q_proj")] if is_key else 1.0)
        assert float(known[name].double().norm()) == pytest.approx(norm, rel=1e-4, abs=rounding), name
    for name in ("transformer.action_decoder.bias.weight", "transformer.soft_prompt_hub.weight"):
        expected = io[f"grad.{name}"]
        torch.testing.assert_close(known[f"model.{name}"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        known[shared], io["grad.vlm.language_model.shared.weight"], rtol=1e-4, atol=1e-4
    )


def test_features_predictions_and_samples_are_those_that_lerobot_recorded(policy: Wide, io):
    batch = recorded(io)
    with torch.no_grad():
        views = policy._views(batch)
        torch.testing.assert_close(views[:, :2].flatten(0, 1), io["out.vision_tokens"], **CLOSE)
        assert not views[:, 2].any()  # the third view is missing: zeros
        context = policy.encode(batch)
        time = io["out.time"][:, None]
        noisy = xvla.interpolate(io["raw.action"][:, None], io["raw.noise"][:, None], time)
        predicted = policy.predict(context, batch.state, noisy, time)[:, 0]
    torch.testing.assert_close(predicted, io["out.pred_action"], **CLOSE)
    embedded = xvla.time_waves(io["out.time"], CONFIG.expert.time_dim)
    torch.testing.assert_close(embedded, io["out.time_embedding"], rtol=0.0, atol=1e-6)
    for steps in (1, 4, 10):
        actions = policy.sample(batch, io["raw.noise"], steps)
        torch.testing.assert_close(actions, io[f"out.sample_actions.n{steps}"], **CLOSE)
    torch.testing.assert_close(actions, io["out.predict_action_chunk"], **CLOSE)


INSIDE = {  # recorded name -> our module
    "vision_conv0": "vision.convs.0",
    "vision_stage0": "vision.blocks.0.0",
    "vision_stage1": "vision.blocks.1.0",
    "vision_stage2": "vision.blocks.2.1",
    "vision_stage3": "vision",
    "lm_embed_ln": "language.layernorm_embedding",
    "vlm_features": "language",
    "vlm_proj": "expert.vlm_proj",
    "aux_proj": "expert.aux_visual_proj",
    "action_tokens": "action_encoder",
    "block0": "expert.blocks.0",
    "last_block": "expert.blocks.1",
}


def test_what_every_layer_computes_is_what_lerobot_recorded(policy: Wide, io):
    batch, inside = recorded(io), io | load_file(FIXTURE / "intermediate.safetensors")
    found: dict[str, Tensor] = {}
    hooks = [
        policy.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: found.setdefault(name, out)
        )
        for name in INSIDE.values()
    ]
    time = io["out.time"][:, None]
    noisy = xvla.interpolate(io["raw.action"][:, None], io["raw.noise"][:, None], time)
    with torch.no_grad():
        policy.predict(policy.encode(batch), batch.state, noisy, time)
        rest = policy._views(batch)[:, 1:].flatten(1, 2)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(noisy[:, 0], io["out.x_t"], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(rest, inside["out.aux_visual_inputs"], **CLOSE)
    for theirs, ours in INSIDE.items():
        wanted = inside[f"out.{theirs}"]
        torch.testing.assert_close(found[ours].reshape(wanted.shape), wanted, **CLOSE, msg=theirs)
    begin = (io["raw.rand1"] + torch.arange(2) / 2) % xvla.TIME_BELOW  # LeRobot's one draw for the batch
    torch.testing.assert_close(begin, io["out.time"], rtol=0.0, atol=1e-6)


def test_padding_counts_without_a_mask_and_a_camera_that_lacks_is_a_view_of_zeros(policy: Wide, io):
    batch = recorded(io)
    assert loss_of(policy, batch, io)[0].item() == pytest.approx(io["padded.loss"].item(), **LOSS)
    one = loss_of(policy, recorded(io, ("image",)), io)[0].item()
    assert one == pytest.approx(io["missing_second_camera.loss"].item(), **LOSS)
    masked = replace(batch, image_mask=torch.tensor([[True, False]] * 2))
    assert loss_of(policy, masked, io)[0].item() == pytest.approx(one, rel=1e-6)
    state = batch.state.clone()
    state[:, 7:] = 0.0
    actions = batch.actions.clone()
    actions[:, 5:] = 0.0
    short = replace(batch, state=state, actions=actions)
    assert loss_of(policy, short, io)[0].item() == pytest.approx(io["short.loss"].item(), **LOSS)


@pytest.mark.parametrize("groups", variants(["", "_own_groups"], always=["_own_groups"]))
def test_steps_of_adamw_follow_the_recorded_curve(groups: str, io, numbers):
    policy = loaded()
    slow = [
        p
        for i, p in zip(policy.parts(), policy.parameters(), strict=True)
        if not i.dead
        and (i.part in ("vision", "projector", "language") or i.name.startswith("expert.vlm_proj"))
    ]
    fast = [
        p
        for i, p in zip(policy.parts(), policy.parameters(), strict=True)
        if not i.dead and all(p is not other for other in slow)
    ]
    if groups:
        facts = json.loads((FIXTURE / "numbers.json").read_text())["own_groups"]
        assert sum(p.numel() for p in slow) == facts[0][2]
    slow_lr = 1e-4 if groups else 1e-3
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": slow_lr}, {"params": fast, "lr": 1e-3}], betas=(0.9, 0.99), weight_decay=0.0
    )
    for step in range(4):
        loss, _ = loss_of(policy, recorded(io), io)
        assert loss.item() == pytest.approx(numbers[f"curve{groups}.{step}"], rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["ee6d", "agibot_ee6d", "joint", "auto", "franka_joint7", "so101_bimanual"])
def test_every_action_space_has_the_recorded_losses_inputs_and_outputs(name: str, policy: Wide):
    recorded = load_file(FIXTURE / "action_spaces.safetensors")
    listed = json.loads((FIXTURE / "action_spaces.json").read_text())
    values = {k.removeprefix(f"{name}."): v for k, v in recorded.items() if k.startswith(f"{name}.")}
    predicted, target = values["pred"], values["target"]
    width, real = predicted.shape[2], target.shape[2]
    space = xvla.space_of(name, width, real if name == "auto" else 0)
    padded = torch.nn.functional.pad(target, (0, width - real))
    sums = xvla.error_sums(space, predicted, padded, None)
    counts = {n: float(padded[..., list(t.channels)].numel()) for n, t in space.terms.items()}
    weights = {n: t.weight for n, t in space.terms.items()}
    loss = mean_loss(weights, {n: float(s) for n, s in sums.items()}, counts)
    assert loss == pytest.approx(float(values["loss"]), rel=1e-6)
    groups = {"position": "xyz", "rotate6D": "rotation", "gripper": "gripper", "joints": "joints"}
    groups |= {"left_arm": "left_arm", "right_arm": "right_arm"}
    for key, value in listed.items():
        if key.startswith(f"{name}."):
            begin = groups[key.removeprefix(f"{name}.").removesuffix("_loss")]
            parts = [weights[n] * float(sums[n]) / counts[n] for n in sums if n.startswith(begin)]
            assert sum(parts) == pytest.approx(value, rel=1e-6), key
    assert xvla.hidden(space, values["proprio"]).equal(values["pre_proprio"])
    noisy = torch.nn.functional.pad(values["target"], (0, width - real))
    assert xvla.hidden(space, noisy).equal(values["pre_action"])
    torch.testing.assert_close(
        xvla.outputs(space, predicted)[..., :real], values["post"], rtol=0.0, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------- promises

TINY = xvla.SIZES["xvla-tiny"]
KEYS = [(0, row) for row in range(3)]


@pytest.fixture(scope="module")
def tiny() -> xvla.XVLA:
    return xvla.build(TINY, "cpu").eval()


def tiny_batch(policy: xvla.XVLA, seed: int = 0) -> Batch:
    """Row 0 lacks the first camera; every prompt is padded."""
    batch = random_batch(policy.needs(), 3, seed)
    batch.image_mask[0, 0] = False
    batch.token_mask = torch.arange(12)[None] < torch.tensor([[4], [7], [9]])
    batch.embodiment_id = torch.tensor([1, 3, 1])
    return batch


def sums_of(policy: xvla.XVLA, batch: Batch, draws: int = 1, keys: list[tuple[int, int]] = KEYS) -> float:
    (total,) = policy.loss(batch, sample_rng(keys, seed=0, draws=draws)).values()
    return total.item()


def test_a_sample_does_not_depend_on_its_batch_nor_on_trimming(tiny: xvla.XVLA):
    batch = tiny_batch(tiny)
    rows = [
        replace(batch, **{name: value[i : i + 1] for name, value in batch.present().items()})
        for i in range(3)
    ]
    for draws in (1, 3):
        alone = [sums_of(tiny, row.trim(4), draws, [key]) for row, key in zip(rows, KEYS, strict=True)]
        assert sums_of(tiny, batch, draws) == pytest.approx(sum(alone), rel=1e-5)
    assert len(rows[0].trim(4).image_mask[0]) == 1 and rows[0].trim(4).tokens.shape[1] == 4


def test_what_is_masked_has_no_influence(tiny: xvla.XVLA):
    batch = tiny_batch(tiny)
    batch.action_mask[:, -1] = False
    batch.actions[:, -1] = 0.0  # the other actions see them, unless they are no numbers
    before = sums_of(tiny, batch)
    batch.images[0, 0] = float("nan")
    batch.actions[:, -1] = float("nan")
    batch.tokens[~batch.token_mask] = 7
    assert sums_of(tiny, batch) == before
    assert tiny.counts(batch, 2) == {"joints": 2.0 * 3 * 3 * 5}


def test_padding_of_the_prompt_is_read_unless_the_config_masks_it(tiny: xvla.XVLA):
    masked = xvla.build(replace(TINY, attends_padding=False), "cpu").eval()
    longer = {"max_tokens": 14}
    for policy, reads in ((tiny, True), (masked, False)):
        batch = tiny_batch(policy)
        batch.image_mask[:, 1] = False  # what follows the prompt would move with its length
        other = xvla.build(replace(policy.config, pad_token=5), "cpu").eval()
        with torch.no_grad():
            for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
                theirs.copy_(mine)
        same = sums_of(other, batch) == pytest.approx(sums_of(policy, batch), rel=1e-6)
        assert same != reads
    assert xvla.build(replace(TINY, **longer)).needs().max_tokens == 14


def test_each_domain_has_its_own_weights_and_only_those_learn(tiny: xvla.XVLA):
    batch = tiny_batch(tiny)
    before = sums_of(tiny, batch)
    policy = xvla.build(TINY, "cpu").eval()
    tables = [n for n, p in policy.named_parameters() if n.startswith(("action_", "soft_prompts"))]
    with torch.no_grad():
        for name in tables:
            policy.get_parameter(name)[2] += 1.0
    assert sums_of(policy, batch) == before
    (total,) = policy.loss(batch, sample_rng(KEYS, seed=0)).values()
    total.backward()
    for name in tables:
        gradient = policy.get_parameter(name).grad
        assert not gradient[[0, 2]].any() and gradient[[1, 3]].any(), name
    unnamed = replace(batch, embodiment_id=None)
    assert sums_of(policy, unnamed) == sums_of(
        policy, replace(batch, embodiment_id=torch.zeros(3, dtype=int))
    )


def test_fields_that_do_not_fit_are_named(tiny: xvla.XVLA):
    batch = tiny_batch(tiny)
    with pytest.raises(CodecError, match=r"embodiment_id reaches from 1 to 4; .* embodiments 0 to 3"):
        sums_of(tiny, replace(batch, embodiment_id=torch.tensor([1, 4, 1])))
    with pytest.raises(CodecError, match=r"images has 3 cameras; this policy takes at most 2"):
        images, mask = batch.images[:, [0, 0, 1]], batch.image_mask[:, [0, 0, 1]]
        sums_of(tiny, replace(batch, images=images, image_mask=mask))
    space = {"action_space": "ee6d", "action_dim": 20, "state_dim": 20}
    arms = xvla.build(replace(TINY, **space), "cpu")
    graspless = random_batch(arms.needs(), 3)
    with pytest.raises(CodecError, match=r"dimension 9 .* from 0 to 1"):
        arms.counts(graspless, 1)
    graspless.actions[..., [9, 19]] = 1.0
    assert arms.counts(graspless, 1)["gripper"] == 3 * 4 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_space": "joint"}, "action_dim is 5; .* 'joint' have at least and at most 14"),
        ({"real_dim": 6}, "real_dim is 6; .* at most 5"),
        ({"pad_token": 300}, "pad_token is 300; .* at most 299"),
        ({"views": 9}, "views 9 of 5 tokens each"),
        ({"vision": replace(TINY.vision, stage_heads=(2,))}, "vision.stage_heads has 1 entries"),
        ({"vision": replace(TINY.vision, stage_groups=(2, 5))}, "no multiple of vision.stage_groups 5"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_shipped_strategies_train_what_they_say(tiny: xvla.XVLA):
    infos = {info.name: info for info in tiny.parts()}
    assert {i.part for i in infos.values()} == {
        "vision", "projector", "language", "expert", "projections", "soft_prompts"
    }  # fmt: skip
    trained = {n: set(preview(tiny, load_strategy(n)).trainable) for n in ("expert", "projections", "mlp")}
    assert {infos[name].part for name in trained["expert"]} == {"expert", "projections"}
    assert {name.split(".")[0] for name in trained["projections"]} == {"action_encoder", "action_decoder"}
    assert (
        "language.layers.0.fc1.weight" in trained["mlp"]
        and "expert.blocks.0.mlp.fc1.weight" in trained["mlp"]
    )
    assert [i.name for i in infos.values() if i.dead] == [xvla.TIMES]
    stages = {i.layer for i in infos.values() if i.part == "vision" and i.name.startswith("vision.blocks.")}
    assert stages == {0, 1}


def test_lora_on_every_layer_changes_nothing_until_it_learns_and_merges_back():
    policy = xvla.build(TINY, "cpu").eval()
    batch = tiny_batch(policy)
    before = policy.act(batch, sample_rng(KEYS, seed=0))
    apply(
        policy,
        load_strategy("lora-all"),
        probe=lambda: policy.eval().act(batch, sample_rng(KEYS, seed=0)),
    )
    policy.eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted = policy.act(batch, sample_rng(KEYS, seed=0))
    assert (adapted - before).abs().max() > 1e-3
    # 3 * 8 products in a row and their adapters, of up to 64 terms: 2 * 2^-24 * sqrt(48 * 64) = 6.6e-6.
    merged = vlafit.merge(policy).act(batch, sample_rng(KEYS, seed=0))
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_those_of_the_seed_and_dropout_is_only_for_training(tiny: xvla.XVLA):
    other = xvla.build(TINY, "cpu")
    assert all(a.equal(b) for a, b in zip(tiny.parameters(), other.parameters(), strict=True))
    drawn = xvla.init_weights(other, torch.Generator().manual_seed(1), ["soft_prompts"])
    assert drawn == ["soft_prompts.weight"]
    batch = tiny_batch(tiny)
    assert sums_of(other.eval(), batch) == sums_of(other.eval(), batch)
    assert sums_of(other.train(), batch) != sums_of(other, batch)


def test_a_saved_policy_loads_bit_for_bit(tiny: xvla.XVLA, tmp_path: Path):
    vlafit.save_checkpoint(tiny, tmp_path / "saved")
    again = vlafit.load_policy(tmp_path / "saved").eval()
    batch = tiny_batch(tiny)
    assert again.act(batch, sample_rng(KEYS, seed=0)).equal(tiny.act(batch, sample_rng(KEYS, seed=0)))


def test_memory_and_arithmetic_are_counted_on_the_meta_device():
    policy = build_family("xvla", "xvla-tiny", device="meta")
    made = forecast(policy, load_strategy("full"), Workload(2, cameras=2, precision="fp32", frozen="fp32"))
    assert made.activations > 0 and made.gradients == 4 * sum(
        p.numel() for p in policy.parameters() if p is not policy.get_parameter(xvla.TIMES)
    )
    count = FlopCounter(policy, preview(policy, load_strategy("full")), draws=1)
    assert count(BatchShape(rows=2, cameras=2, tokens=12)) == 2 * count(BatchShape(1, 2, 12)) > 0
