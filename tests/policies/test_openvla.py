"""OpenVLA-OFT against what its authors' code recorded, and what its masks, FiLM and head promise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlafit.checkpoints.formats.openvla import names
from vlafit.codec import Normaliser, Statistics
from vlafit.codec.images import OPENVLA_CROP, cut_middle, fit_image, lanczos
from vlafit.codec.prompts import FORMS
from vlafit.errors import ConfigError
from vlafit.nn.batch import Batch
from vlafit.nn.prismatic import TowerSizes
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family, openvla
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.train.forecast import Workload, forecast
from vlafit.tuning import apply_strategy, load_strategy, preview

FIXTURE = Path(__file__).parents[1] / "fixtures" / "openvla_oft"
CONFIG = openvla.OpenVLAConfig(
    openvla.VisionConfig(TowerSizes(32, 3, 128, 2), TowerSizes(40, 3, 149, 2), patch=14, image_size=42),
    openvla.LanguageConfig(width=48, depth=3, mlp=96, heads=4, kv_heads=4, vocab=576),
    openvla.ExpertConfig(width=48),
    state_dim=8, action_dim=7, chunk=8, max_tokens=16,
)  # fmt: skip
PROMPTS = (15, 11)  # tokens of the recorded prompts, with the first and the empty one
CLOSE = {"rtol": 0.0, "atol": 1e-4}
KEYS = [(0, row) for row in range(3)]
TINY = openvla.SIZES["openvla-oft-tiny"]


def stored(film: bool = False) -> dict[str, Tensor]:
    """The recorded weights by the names of one file."""
    tensors = load_file(FIXTURE / "model.safetensors")
    for module, prefix in (("action_head_l1", "action_head."), ("proprio_projector", "proprio_projector.")):
        tensors |= {prefix + n: t for n, t in load_file(FIXTURE / f"{module}.safetensors").items()}
    return tensors | (load_file(FIXTURE / "film.safetensors") if film else {})


def loaded(film: bool = False) -> openvla.OpenVLA:
    policy = openvla.build(replace(CONFIG, film=film), "cpu")
    weights = names.read(stored(film)).weights
    assert set(weights) == {name for name, _ in policy.named_parameters()}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights[name])
    return policy


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture(scope="module")
def meta() -> dict:
    return json.loads((FIXTURE / "meta.json").read_text())


@pytest.fixture(scope="module")
def policy() -> openvla.OpenVLA:
    return loaded()


def recorded(io: dict[str, Tensor]) -> Batch:
    """The recorded inputs; images as SigLIP takes them are those in [-1, 1]."""
    pixels = io["in.pixel_values"].unflatten(1, (2, 2, 3))
    length = max(PROMPTS)
    return Batch(
        images=pixels[:, :, 1],
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        state=io["in.proprio"],
        tokens=io["in.input_ids"][:, :length],
        token_mask=torch.arange(length)[None] < torch.tensor(PROMPTS)[:, None],
        actions=io["in.actions"],
    )


def loss_of(policy: openvla.OpenVLA, batch: Batch) -> Tensor:
    """The loss as the trainer makes it."""
    sums, counts = policy.loss(batch, sample_rng(KEYS[: len(batch)], seed=0)), policy.counts(batch, 1)
    return sums["error"] / counts["error"]


# ------------------------------------------------------------------------------------------ what was recorded


def test_features_hidden_states_and_actions_are_those_that_the_authors_code_recorded(policy, io):
    batch = recorded(io)
    with torch.no_grad():
        features = policy.features(batch.images.flatten(0, 1), None, 2).unflatten(0, (2, 2)).flatten(1, 2)
        torch.testing.assert_close(features, io["out.vision_fused"], **CLOSE)
        torch.testing.assert_close(features[:, :9, :32], io["out.vision_dino.0"], **CLOSE)
        torch.testing.assert_close(features[:, :9, 32:], io["out.vision_siglip.0"], **CLOSE)
        torch.testing.assert_close(policy.images(batch, None), io["out.projector"], **CLOSE)
        projected = torch.cat((policy.images(batch, None), io["out.proprio_token"][:, None]), 1)
        torch.testing.assert_close(projected, io["out.projector_features_with_proprio"], **CLOSE)
        prefix = policy.prefix(batch)
        torch.testing.assert_close(prefix.x[:, 1:20], projected, **CLOSE)
        torch.testing.assert_close(policy.action_states(batch), io["out.action_hidden"], **CLOSE)
        # Recorded are the places 31 to 36 of both rows; the first prompt ends at 33.
        logits = policy.lm_head(policy.action_states(batch)[0, :4])
        torch.testing.assert_close(logits, io["out.logits_first_action_positions"][0, 2:], **CLOSE)
        counted = io["out.action_mask_of_labels_1"]
        assert counted.sum(1).tolist() == [8 * 7] * 2
        first = (
            counted.int().argmax(1) + 18 + 1
        )  # the place before the first action's, images and state in front
        assert first.tolist() == prefix.last.tolist()
    actions = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    torch.testing.assert_close(actions, io["out.predicted_actions"], **CLOSE)


def normalisers() -> tuple[Normaliser, Normaliser]:
    """Those of the recorded statistics: of states, and of actions, whose gripper is left as it is."""
    read = json.loads((FIXTURE / "dataset_statistics.json").read_text())["tiny_no_noops"]
    made = []
    for column in ("proprio", "action"):
        numbers = {n: read[column][n] for n in ("mean", "std", "q01", "q99", "min", "max")}
        statistics = Statistics.from_json({"count": 1000, **numbers}, column)
        made.append(
            Normaliser.fit(statistics, "openvla_quantile", [not m for m in read[column].get("mask", [])])
        )
    return made[0], made[1]


def test_answers_to_single_observations_are_the_recorded_ones_in_the_robots_units(policy, io):
    _, normaliser = normalisers()
    batch = recorded(io)
    for row in range(2):
        one = replace(batch, **{name: value[row : row + 1] for name, value in batch.present().items()})
        with torch.no_grad():
            hidden = policy.action_states(one.trim(1))
        torch.testing.assert_close(hidden, io[f"predict.l1_hidden.{row}"], **CLOSE)
        answer = policy.act(one.trim(1), sample_rng(KEYS[:1], seed=0))[0].double().numpy()
        np.testing.assert_allclose(normaliser.decode(answer), io[f"predict.l1.{row}"].numpy(), **CLOSE)


def test_loss_gradients_and_the_curve_of_adamw_are_the_recorded_ones(io, meta):
    policy, batch = loaded(), recorded(io)
    loss = loss_of(policy, batch)
    assert loss.item() == pytest.approx(io["out.l1_loss"].item(), rel=1e-6)
    loss.backward()
    norms = {
        n.replace("action_head_l1.", "action_head.").removeprefix("vla."): v
        for n, v in meta["grad_norms_l1"].items()
    }
    gradients = {names.NAMES.file_name(n): p.grad for n, p in policy.named_parameters()}
    dead = {names.NAMES.file_name(i.name) for i in policy.parts() if i.dead}
    assert set(norms) == set(gradients) and {n for n, v in norms.items() if v is None} == dead
    for name, gradient in gradients.items():
        if norms[name] is None:
            assert gradient is None, name
        else:
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(norms[name], rel=1e-4), name
    facts = meta["adamw_l1"]
    live = [p for i, p in zip(policy.parts(), policy.parameters(), strict=True) if not i.dead]
    optimizer = torch.optim.AdamW(live, lr=facts["lr"], weight_decay=facts["weight_decay"])
    for step, expected in enumerate(facts["curve"]):
        loss = loss_of(policy, batch)
        assert loss.item() == pytest.approx(expected, rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_film_gives_the_recorded_features_loss_and_answers(io):
    policy, batch = loaded(film=True), recorded(io)
    _, normaliser = normalisers()
    mean = io["film.average_language_embedding"]  # the authors' code counts padding in a batch
    with torch.no_grad():
        features = policy.features(batch.images.flatten(0, 1), mean, 2).unflatten(0, (2, 2)).flatten(1, 2)
        torch.testing.assert_close(features, io["film.vision_fused"], **CLOSE)
        error = (policy.predict(batch, mean) - batch.actions).abs().mean()
        assert error.item() == pytest.approx(io["film.l1_loss"].item(), rel=1e-6)
        answers = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    for row in range(2):
        decoded = normaliser.decode(answers[row].double().numpy())
        np.testing.assert_allclose(decoded, io[f"film.predict.l1.{row}"].numpy(), **CLOSE)


def test_pictures_are_resized_and_cut_as_tensorflow_does_within_a_grey_level():
    recorded = load_file(FIXTURE / "images_tf.safetensors")
    resized = lanczos(recorded["input"].numpy(), 224, 224)[::8]
    cropped = cut_middle(recorded["whole"].numpy(), OPENVLA_CROP**0.5)[::8]
    # The picture of blocks has many values midway between two levels, which rounding takes either way.
    for mine, name, share in ((resized, "resized", 4e-3), (cropped, "cropped", 1e-3)):
        difference = np.abs(mine.astype(int) - recorded[name].numpy().astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < share, name
    whole = fit_image(recorded["input"].numpy(), 224, "openvla")
    assert np.array_equal(whole, cut_middle(lanczos(recorded["input"].numpy(), 224, 224), OPENVLA_CROP**0.5))


def test_values_are_normalised_as_the_authors_do_and_come_back():
    states, actions = normalisers()
    q01, q99 = actions.offset, actions.offset + actions.scale
    values = np.stack([q01, (q01 + q99) / 2, q99, q99 + 1])
    values[:, 6] = (0, 1, 0.5, 7)
    normal = actions.encode(values)
    assert normal[:, 6].tolist() == [0, 1, 0.5, 7]  # the gripper is not normalised
    np.testing.assert_allclose(normal[:, :6], np.array([[-1], [0], [1], [1]]).repeat(6, 1), atol=1e-6)
    np.testing.assert_allclose(actions.decode(normal)[:3], values[:3], atol=1e-6)
    assert actions.decode(np.full(7, 2.0))[0] > q99[0]  # answers are not clipped
    assert states.unchanged is None
    still = Statistics.of(np.array([[1.0, 0.0], [1.0, 2.0]]))
    assert Normaliser.fit(still, "openvla_quantile").encode(np.array([[5.0, 1.0]]))[0, 0] == 0


def test_the_prompt_is_the_authors_question_with_the_instruction_in_lower_case():
    pieces = FORMS["openvla"].pieces("Put the Bowl on the plate", np.zeros(0))
    assert pieces == ("In: What action should the robot take to put the bowl on the plate?\nOut: ",)


# --------------------------------------------------------------------------------------------------- promises


@pytest.fixture(scope="module")
def tiny() -> openvla.OpenVLA:
    return openvla.build(TINY, "cpu")


def tiny_batch(policy: openvla.OpenVLA) -> Batch:
    """Row 0 lacks the first camera; every prompt is padded."""
    batch = random_batch(policy.needs(), 3)
    batch.image_mask[0, 0] = False
    batch.token_mask = torch.arange(batch.prompt()[0].shape[1])[None] < torch.tensor([[4], [7], [9]])
    return batch


def test_a_sample_does_not_depend_on_its_batch_nor_on_trimming_padding_and_missing_cameras(tiny):
    batch = tiny_batch(tiny)
    whole = tiny.act(batch, sample_rng(KEYS, seed=0))
    spoiled = replace(batch, images=batch.images.clone(), tokens=batch.prompt()[0].clone())
    spoiled.images[0, 0] = float("nan")
    spoiled.prompt()[0][~batch.prompt()[1]] = 7
    torch.testing.assert_close(tiny.act(spoiled, sample_rng(KEYS, seed=0)), whole, rtol=1e-5, atol=1e-5)
    for row in range(3):
        one = replace(batch, **{n: v[row : row + 1] for n, v in batch.present().items()}).trim(1)
        answer = tiny.act(one, sample_rng(KEYS[row : row + 1], seed=0))
        torch.testing.assert_close(answer, whole[row : row + 1], rtol=1e-5, atol=1e-5)


def test_masked_actions_do_not_count_and_draws_are_alike(tiny):
    batch = tiny_batch(tiny)
    assert batch.action_mask is not None and batch.actions is not None
    batch.action_mask[:, 2:] = False
    rng = [sample_rng(KEYS, seed=0, draws=draws) for draws in (1, 3)]
    (once,), (thrice,) = (tiny.loss(batch, one).values() for one in rng)
    assert thrice.item() == pytest.approx(3 * once.item())
    batch.actions[:, 2:] = float("nan")
    assert tiny.loss(batch, sample_rng(KEYS, seed=0))["error"].item() == pytest.approx(once.item())


def test_the_instruction_modulates_the_towers_only_with_film(tiny):
    batch = tiny_batch(tiny)
    other = replace(batch, tokens=(batch.prompt()[0] + 1) % TINY.language.vocab)
    words = [
        openvla.mean_embedding(
            tiny.language.embed_tokens(b.prompt()[0]), b.prompt()[1], torch.zeros(3, 1, 32)
        )
        for b in (batch, other)
    ]
    assert not torch.equal(tiny.images(batch, words[0]), tiny.images(batch, words[1]))
    plain = openvla.build(replace(TINY, film=False), "cpu")
    assert not any(i.part == "film" for i in plain.parts())
    assert torch.equal(plain.images(batch, words[0]), plain.images(batch, words[1]))


def test_the_state_is_read_only_with_proprio(tiny):
    batch = tiny_batch(tiny)
    other = replace(batch, state=batch.state + 1)
    rng = sample_rng(KEYS, seed=0)
    assert not torch.equal(tiny.act(batch, rng), tiny.act(other, rng))
    blind = openvla.build(replace(TINY, proprio=False), "cpu")
    assert torch.equal(blind.act(batch, rng), blind.act(other, rng))
    assert not any(i.part == "projections" for i in blind.parts())


def test_the_public_size_has_the_tensors_and_parameters_of_openvla_7b():
    policy = openvla.build(openvla.SIZES["openvla-oft"], "meta")
    counts: dict[str, int] = {}
    for info in policy.parts():
        counts[info.part] = counts.get(info.part, 0) + policy.get_parameter(info.name).numel()
    base = sum(counts[part] for part in ("vision", "projector", "language"))
    assert base == 7_541_237_184  # openvla/openvla-7b: model.safetensors.index.json says 15,082,474,368 bytes
    assert policy.get_parameter("expert.fc1.weight").shape == (4096, 7 * 4096)
    assert policy.get_parameter("vision.siglip.layers.0.mlp.fc1.weight").shape == (4304, 1152)


def test_oft_trains_lora_on_all_linear_layers_and_head_projector_and_film_in_full(tiny):
    plan = preview(tiny, load_strategy("openvla-oft"))
    adapted = {e.adapts for e in plan.entries if e.adapts}
    linear = {
        f"{name}.weight"
        for name, module in tiny.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    dead = {i.name for i in tiny.parts() if i.dead}
    own = {i.name for i in tiny.parts() if i.part in ("expert", "projections", "film") and i.name not in dead}
    assert {name for name in linear if name in own} <= {e.name for e in plan.entries if e.trainable}
    assert linear - own - dead == adapted
    trained = {e.name for e in plan.entries if e.trainable and not e.adapts}
    assert trained == own


def test_ofts_adapters_begin_as_its_script_draws_them():
    policy = openvla.build(TINY, "cpu")
    apply_strategy(policy, "openvla-oft")
    drawn = [p.detach().flatten() for n, p in policy.named_parameters() if ".lora_A." in n]
    every = torch.cat(drawn)
    assert every.std().item() == pytest.approx(
        1 / 32, rel=5 / (2 * len(every)) ** 0.5
    )  # N(0, 1 / r), five sigma
    assert all(not p.any() for n, p in policy.named_parameters() if ".lora_B." in n)


def test_sizes_that_do_not_go_together_are_named():
    for change, word in (
        ({"language": replace(TINY.language, heads=5)}, "language.heads"),
        ({"vision": replace(TINY.vision, image_size=9)}, "image_size"),
        ({"eos": 300}, "eos"),
        ({"vision": replace(TINY.vision, dino=replace(TINY.vision.dino, heads=3))}, "vision.dino"),
    ):
        with pytest.raises(ConfigError, match=word):
            replace(TINY, **change)


def test_the_tokens_of_a_step_are_counted():
    policy = build_family("openvla", "openvla-oft-tiny", device="meta")
    batch = random_batch(policy.needs(), 2)
    per_sample = 2 * (8 // 4) ** 2 + batch.prompt()[0].shape[1] + 1 + 4 * 5 + 1
    assert policy.tokens(batch, 1) == 2 * per_sample


def test_memory_and_arithmetic_are_counted_on_the_meta_device():
    policy = build_family("openvla", "openvla-oft-tiny", device="meta")
    made = forecast(policy, load_strategy("full"), Workload(2, cameras=2, precision="fp32", frozen="fp32"))
    live = [policy.get_parameter(i.name) for i in policy.parts() if not i.dead]
    assert made.activations > 0 and made.gradients == 4 * sum(p.numel() for p in live)
    count = FlopCounter(policy, preview(policy, load_strategy("full")), draws=1)
    assert count(BatchShape(rows=2, cameras=2, tokens=12)) == 2 * count(BatchShape(1, 2, 12)) > 0
