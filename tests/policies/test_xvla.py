"""X-VLA against what LeRobot recorded, and what its masks, domains and action spaces promise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlafit.checkpoints.formats.lerobot.names import XVLA as NAMES
from vlafit.nn.batch import Batch
from vlafit.nn.policy import mean_loss
from vlafit.policies import xvla

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
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (xvla.PIXEL_MEAN, xvla.PIXEL_STD)
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
        assert mine == pytest.approx(numbers[f"loss.{name}_loss"], rel=1e-6, abs=1e-4 if name != "position" else 0)
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    norms = {k.removeprefix("gradnorm."): v for k, v in numbers.items() if k.startswith("gradnorm.")}
    known = {NAMES.file_name(name): gradient for name, gradient in gradients.items()}
    shared = "model.vlm.language_model.shared.weight"
    known[shared] = known["model.vlm.language_model.encoder.embed_tokens.weight"]
    assert set(norms) <= set(known)
    for name, norm in norms.items():
        # A softmax does not see a constant in its scores: the gradient of a key's bias is only rounding, 2^-24
        # of terms as large as the query's.
        rounding = 1e-6 * norms[name.replace("k_proj", "q_proj")] if name.endswith("k_proj.bias") else 1e-6
        assert float(known[name].double().norm()) == pytest.approx(norm, rel=1e-4, abs=rounding), name
    for name in ("transformer.action_decoder.bias.weight", "transformer.soft_prompt_hub.weight"):
        expected = io[f"grad.{name}"]
        torch.testing.assert_close(known[f"model.{name}"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(known[shared], io["grad.vlm.language_model.shared.weight"], rtol=1e-4, atol=1e-4)


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
    embedded = xvla._time_embedding(io["out.time"], CONFIG.expert.time_dim)
    torch.testing.assert_close(embedded, io["out.time_embedding"], rtol=0.0, atol=1e-6)
    for steps in (1, 4, 10):
        actions = policy.sample(batch, io["raw.noise"], steps)
        torch.testing.assert_close(actions, io[f"out.sample_actions.n{steps}"], **CLOSE)
    torch.testing.assert_close(actions, io["out.predict_action_chunk"], **CLOSE)


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


@pytest.mark.parametrize("groups", ["", "_own_groups"])
def test_steps_of_adamw_follow_the_recorded_curve(groups: str, io, numbers):
    policy = loaded()
    slow = [
        p
        for i, p in zip(policy.parts(), policy.parameters(), strict=True)
        if not i.dead and (i.part in ("vision", "projector", "language") or i.name.startswith("expert.vlm_proj"))
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
    torch.testing.assert_close(xvla.outputs(space, predicted)[..., :real], values["post"], rtol=0.0, atol=1e-6)
