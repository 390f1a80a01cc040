"""openpi's PyTorch pi0: names, exact weights, and the outputs that openpi itself recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from vlafit.checkpoints.formats.lerobot.names import PI0 as lerobot_names
from vlafit.checkpoints.formats.openpi.names import NAMES
from vlafit.checkpoints.infer import ConfigEvidence, infer_config
from vlafit.checkpoints.name_map import back, translate
from vlafit.errors import WeightsError
from vlafit.nn.batch import Batch
from vlafit.policies.pi0 import SIZES, Pi0, build

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = FIXTURES / "openpi_pi0"
HEADS = {"vision.heads": 2}  # the only thing that neither shapes nor openpi's config tell
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
DEAD_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint as openpi leaves it."""
    shutil.copy(RECORDED / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copy(RECORDED / "openpi_config.json", tmp_path / "config.json")
    return tmp_path


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "expected.safetensors")


@pytest.fixture(scope="module")
def recorded() -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The batch, noise and time of the recording."""
    i = load_file(RECORDED / "inputs.safetensors")
    batch = Batch(
        images=torch.stack([i[f"image.{c}"].permute(0, 3, 1, 2) for c in CAMERAS], 1),
        image_mask=torch.stack([i[f"image_mask.{c}"] for c in CAMERAS], 1),
        tokens=i["tokens"].long(),
        token_mask=i["token_mask"],
        state=i["state"],
        actions=i["actions"],
    )
    return batch, i["noise"], i["time"]


@pytest.fixture(scope="module")
def policy() -> Pi0:
    loaded = vlafit.load_policy(RECORDED, config={"chunk": 6, **HEADS})
    assert isinstance(loaded, Pi0)
    return loaded


@pytest.mark.parity
def test_velocity_and_loss_are_those_that_openpi_recorded(policy: Pi0, recorded: tuple, expected: dict):
    batch, noise, time = recorded
    with torch.no_grad():
        velocity = policy.velocity(batch, noise=noise, time=time)
        loss = policy.flow_loss(batch, noise=noise, time=time)["loss"]
    assert (velocity - expected["v_t"]).abs().max() < 1e-4
    assert abs(loss - expected["loss"]) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_samples_are_those_that_openpi_recorded(policy: Pi0, recorded: tuple, expected: dict, steps: int):
    batch, noise, _ = recorded
    assert (policy.sample(batch, noise, steps) - expected[f"sample_actions_{steps}"]).abs().max() < 1e-4


@pytest.mark.parity
def test_gradients_have_the_norms_that_openpi_recorded(policy: Pi0, recorded: tuple):
    batch, noise, time = recorded
    policy.flow_loss(batch, noise=noise, time=time)["loss"].backward()
    norms = json.loads((RECORDED / "gradient_norms.json").read_text())
    seen = 0
    for info in policy.parts():
        grad = policy.get_parameter(info.name).grad
        theirs = norms.pop(NAMES.file_name(info.name), None)
        assert info.dead == (grad is None)
        if grad is not None and theirs is not None:
            seen += 1
            # A key's bias cannot change a softmax: its gradient is rounding on both sides.
            least = 1e-4 if info.name.endswith("k_proj.bias") else 0.0
            assert float(grad.norm()) == pytest.approx(theirs, rel=1e-3, abs=least), info.name
    assert seen > 90
    assert not any(value for name, value in norms.items() if name not in (LM_HEAD, DEAD_HEAD))
    policy.zero_grad()


def test_the_config_is_read_from_shapes_and_openpis_own_file(folder: Path):
    loaded = vlafit.load_checkpoint(folder, config=HEADS)
    config, report = loaded.policy.config, loaded.report
    assert (config.language.depth, config.language.heads, config.language.head_dim) == (3, 8, 16)
    assert (config.vision.image_size, config.vision.patch, config.vision.depth) == (224, 14, 2)
    assert (config.chunk, config.pi05, config.state_input) == (6, False, "continuous")
    assert (report.form, report.tied, report.unused) == ("openpi", (LM_HEAD,), (DEAD_HEAD,))
    assert report.parameters == 300_720 - 512 * 48
    assert "knowingly unused (1): paligemma_with_expert.gemma_expert.lm_head.weight" in report.text()


def test_what_shapes_cannot_tell_is_asked_for_by_its_key(folder: Path):
    with pytest.raises(WeightsError, match=r"'vision\.heads'.*config=\{'vision\.heads': N\}"):
        vlafit.load_policy(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"give it: --config chunk=N"):
        vlafit.load_policy(folder, config=HEADS)


def test_a_config_json_of_somebody_else_is_not_believed(folder: Path):
    (folder / "config.json").write_text(json.dumps({"action_horizon": 99, "source": "a recorder"}))
    with pytest.raises(WeightsError, match="'chunk'"):
        vlafit.load_policy(folder, config=HEADS)


def test_weights_pass_through_our_names_and_back_bit_for_bit(policy: Pi0):
    there = back(policy.state_dict(), NAMES)
    file = load_file(RECORDED / "model.safetensors")
    assert set(there) == set(file) - {DEAD_HEAD}
    assert all(torch.equal(there[name], file[name]) for name in there)


def test_two_copies_of_the_tied_embedding_must_be_one(folder: Path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = NAMES.file_name("language.embed_tokens.weight")
    save_file({**tensors, embedding: tensors[LM_HEAD].clone()}, path)
    assert vlafit.load_checkpoint(folder, config=HEADS).report.tied == (LM_HEAD,)
    save_file({**tensors, embedding: tensors[LM_HEAD] + 1}, path)
    with pytest.raises(WeightsError, match=r"tied, but different \(1\): .*embed_tokens.weight"):
        vlafit.load_policy(folder, config=HEADS)


def test_every_kind_of_damage_is_named_in_one_error(folder: Path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = {n: NAMES.file_name(n) for n in ("expert.norm.weight", "state_proj.bias", "language.norm.weight")}
    del tensors[names["expert.norm.weight"]]
    tensors["vision.layers.0.mlp.fc1.weight"] = torch.zeros(2)  # our name, but their file: surplus
    tensors[names["state_proj.bias"]] = torch.zeros(7)
    tensors[names["language.norm.weight"]][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(folder, config=HEADS)
    message = str(caught.value)
    assert f"missing (1): {names['expert.norm.weight']} [expert.norm.weight]" in message
    assert "surplus (1): vision.layers.0.mlp.fc1.weight" in message
    assert "misshapen (1): state_proj.bias is (7,), not (48,)" in message
    assert f"not finite (1): {names['language.norm.weight']} [language.norm.weight]" in message
    assert caught.value.tensors["missing"] == (names["expert.norm.weight"],)


@pytest.mark.parametrize("size", ["pi0", "pi05"])
def test_the_full_size_names_and_shapes_map_one_to_one(size: str):
    layout = json.loads((FIXTURES / "openpi_full_layout.json").read_text())[size]
    theirs = {
        name.replace("*", str(layer), 1): tuple(shape)
        for name, (layers, shape) in layout.items()
        for layer in range(layers)
    }
    ours = {name: tuple(p.shape) for name, p in build(SIZES[size], "meta").named_parameters()}
    mapped = {NAMES.file_name(name): shape for name, shape in ours.items()}
    assert {**mapped, LM_HEAD: theirs[LM_HEAD], DEAD_HEAD: theirs[DEAD_HEAD]} == theirs
    assert len(mapped) == len(ours) == len(theirs) - 2
    assert {NAMES.policy_name(name) for name in mapped} == set(ours)
    # LeRobot's save_pretrained writes the same names under "model.", and both of the tied pair.
    lerobot = {lerobot_names.file_name(name): shape for name, shape in ours.items()}
    embedding = NAMES.file_name("language.embed_tokens.weight")
    assert lerobot == {f"model.{n}": s for n, s in theirs.items() if n not in (LM_HEAD, DEAD_HEAD)}
    assert f"model.{embedding}" in lerobot and f"model.{LM_HEAD}" in lerobot_names.ties.values()
    assert lerobot_names.unused == (f"model.{DEAD_HEAD}",)


def test_the_full_size_config_follows_from_the_full_size_shapes():
    for size in ("pi0", "pi05"):
        meta = {n: p.detach() for n, p in build(SIZES[size], "meta").named_parameters()}
        weights = translate(back(meta, NAMES), NAMES).weights
        inferred = infer_config("pi0", weights, ConfigEvidence(), {}, "here")
        assert (inferred.config, inferred.conflicts) == (SIZES[size], ())
