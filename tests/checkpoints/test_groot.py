"""GR00T's folders, LeRobot's and NVIDIA's: read exactly, exported back, and what they may not say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.forms import GROOT, GROOT_CHAT, save, write_nvidia_groot
from vlafit import checkpoints
from vlafit.checkpoints.assign import compare
from vlafit.checkpoints.export import write
from vlafit.checkpoints.formats.groot import names
from vlafit.checkpoints.formats.lerobot import write_groot as write_lerobot
from vlafit.checkpoints.infer import ConfigEvidence, infer_config
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.policies import groot
from vlafit.policies.groot import SIZES, Groot
from vlafit.types import Observation

TOKENIZER = GROOT / "char_tokenizer"
TASK = "Pick up the red block!"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GROOT, tmp_path / "groot"))


@pytest.fixture(scope="module")
def loaded() -> checkpoints.Loaded:
    return checkpoints.load(GROOT, tokenizer=TOKENIZER)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_step(path: Path, name: str, **changes: object) -> None:
    content = json.loads(path.read_text())
    step = next(step for step in content["steps"] if step["registry_name"] == name)
    step["config"] |= changes
    path.write_text(json.dumps(content))


def public_tensors() -> dict[str, torch.Tensor]:
    """Every tensor of the public checkpoint, by name and shape, on the meta device."""
    tensors = {}
    patterns = json.loads((GROOT / "public_shapes.json").read_text())
    for pattern, shapes in patterns.items():
        for shape, layers in shapes.items():
            bare = torch.empty([int(side) for side in shape.split("x")], device="meta")
            if not layers:
                tensors[pattern] = bare
                continue
            ends, step = layers.split("/")
            first, last = map(int, ends.split("-"))
            for layer in range(first, last + 1, int(step)):
                tensors[pattern.replace("*", str(layer))] = bare
    return tensors


def test_the_public_checkpoint_has_exactly_the_tensors_of_the_public_size():
    tensors = public_tensors()
    translated = names.read(tensors)
    config = infer_config("groot", translated.weights, ConfigEvidence(), {}, "public").config
    assert config == SIZES["groot"]  # by shapes only
    policy = groot.build(config, "meta")
    assert not any(compare(policy, translated.weights).values())
    written = names.written(dict(policy.named_parameters()), config.vision.patch)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    lm_head = "backbone.model.lm_head.weight"
    assert {name: tensor.shape for name, tensor in written.items()} == {
        n: s for n, s in shapes.items() if n != lm_head
    }
    assert len(tensors) == 1031
    assert {translated.file_name(info.name) for info in policy.parts()} == set(shapes) - {lm_head}


def test_lerobots_and_nvidias_folders_of_one_policy_hold_the_same_weights(
    loaded: checkpoints.Loaded, tmp_path: Path
):
    save(write_nvidia_groot(tmp_path), tmp_path)
    other = checkpoints.load(tmp_path, tokenizer=TOKENIZER)
    assert (loaded.report.form, other.report.form) == ("LeRobot GR00T", "GR00T")
    assert loaded.report.tied == ("_groot_model.backbone.model.lm_head.weight",)
    assert_same_weights(loaded.policy, other.policy)
    differences = {
        key for key, value in vars(loaded.policy.config).items() if value != getattr(other.policy.config, key)
    }
    assert differences == {"image_size"}  # LeRobot's processors say 32 pixels, NVIDIA's config.json 256
    assert loaded.policy.config.chat == groot.ChatConfig(**{
        key: tuple(value) if isinstance(value, list) else value for key, value in GROOT_CHAT["chat"].items()
    })  # fmt: skip
    assert other.codec is None and "NVIDIA's processors" in other.report.codec


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_codec(one: Codec | None, two: Codec | None) -> None:
    assert one is not None and two is not None
    rng = np.random.default_rng(0)
    for _ in range(3):
        frames = {
            camera.name: rng.integers(0, 256, camera.shape, dtype=np.uint8)
            for camera in one.embodiment.cameras
        }
        seen = Observation(frames, rng.normal(size=7).astype(np.float32), TASK)
        first, second = one.encode(seen), two.encode(seen)
        for name in ("images", "image_mask", "state", "tokens", "token_mask"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
        chunk = rng.normal(size=(8, 12)).astype(np.float32)
        assert np.array_equal(one.decode(chunk, seen).actions, two.decode(chunk, seen).actions)


@pytest.mark.parametrize("target", ["lerobot", "native"])
def test_what_is_exported_is_read_back_bit_for_bit(target: str, loaded: checkpoints.Loaded, tmp_path: Path):
    out = tmp_path / "out"
    if target == "native":
        checkpoints.save(loaded.policy, out, loaded.codec)
    else:
        notes = write(loaded.policy, loaded.codec, target, out, "the recorded policy").notes
        assert any("base" in note or "codec" in note for note in notes)
    again = checkpoints.load(out)
    assert_same_weights(loaded.policy, again.policy)
    assert again.policy.config == loaded.policy.config and again.policy.steps == 4
    assert_same_codec(loaded.codec, again.codec)
    if target != "native":  # LeRobot looks for image patches by this token, of this tokenizer, in a prompt
        mine, theirs = (
            json.loads((path / "config.json").read_text())
            for path in (out / "backbone", GROOT / "tiny_backbone")
        )
        assert mine["image_token_id"] == theirs["image_token_id"] != mine["video_token_id"]
    if target == "lerobot":
        written = load_file(out / "model.safetensors")
        recorded = load_file(GROOT / "model.safetensors")
        assert written.keys() == recorded.keys()
        assert all(torch.equal(written[name], recorded[name]) for name in recorded)
        mine, theirs = (json.loads((path / "config.json").read_text()) for path in (out, GROOT))
        same = ("type", "chunk_size", "max_state_dim", "max_action_dim", "embodiment_tag", "input_features")
        assert [mine[key] for key in same] == [theirs[key] for key in same]


def test_a_tokenizer_without_a_token_for_images_is_refused(loaded: checkpoints.Loaded, tmp_path: Path):
    words = Path(shutil.copytree(TOKENIZER, tmp_path / "words"))
    text = (words / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other|>")
    (words / "tokenizer.json").write_text(text)
    other = checkpoints.load(GROOT, tokenizer=words)
    for target in ("lerobot", "groot"):
        with pytest.raises(WeightsError, match=r"<\|image_pad\|>"):
            write(other.policy, other.codec, target, tmp_path / target, "the recorded policy")
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda t, n: t.pop(n), "missing"),
        (lambda t, n: t.update({f"{n}_2": t[n].clone()}), "surplus"),
        (lambda t, n: t.update({n: t[n][..., :-1].clone()}), "misshapen"),
        (lambda t, n: t.update({n: t[n] * torch.inf}), "not finite"),
        (lambda t, n: t.update({n: t[n].to(torch.int64)}), "not floating-point"),
    ],
    ids=["missing", "surplus", "misshapen", "not finite", "whole numbers"],
)
def test_damage_to_a_table_of_embodiments_is_named_as_the_file_names_it(
    damage: Callable, fact: str, tmp_path: Path
):
    tensors = write_nvidia_groot(tmp_path)
    name = "action_head.action_encoder.W2.W"
    damage(tensors, name)
    save(tensors, tmp_path)
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(tmp_path, config=GROOT_CHAT)
    assert name in str(caught.value) and fact in str(caught.value)


@pytest.mark.parametrize(
    ("file", "step", "changes", "facts"),
    [
        ("pre", "groot_n1_7_vlm_encode_v1", {"use_albumentations": 1}, ["use_albumentations", "1"]),
        ("pre", "groot_n1_7_vlm_encode_v1", {"image_crop_size": [40, 40]}, ["crop_fraction is 1.25"]),
        ("pre", "groot_n1_7_vlm_encode_v1", {"shortest_image_edge": 40}, ["shortest_image_edge is 40"]),
        ("pre", "groot_n1_7_vlm_encode_v1", {"blur": 1}, ["blur", "guess"]),
        ("pre", "groot_n1_7_pack_inputs_v1", {"valid_action_horizon": 4}, ["valid_action_horizon is 4 of 8"]),
        ("pre", "groot_n1_7_pack_inputs_v1", {"raw_stats": {"state": {}}}, ["raw_stats"]),
        ("pre", "groot_n1_7_pack_inputs_v1", {"clip_outliers": False}, ["clip_outliers"]),
        (
            "pre",
            "groot_n1_7_pack_inputs_v1",
            {"video_modality_keys": ["front"]},
            ["video_modality_keys", "wrist"],
        ),
        ("pre", "groot_n1_7_pack_inputs_v1", {"action_horizon": 40}, ["action_horizon is 40", "8"]),
        ("post", "groot_action_unpack_unnormalize_v2", {"env_action_dim": 5}, ["env_action_dim is 5", "6"]),
        ("post", "groot_action_unpack_unnormalize_v2", {"normalize_min_max": False}, ["does not undo"]),
    ],
)
def test_processors_that_vlafit_does_not_repeat_are_named(
    file: str, step: str, changes: dict[str, object], facts: list[str], folder: Path
):
    path = folder / f"policy_{file}processor.json"
    edit_step(path, step, **changes)
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(folder, tokenizer=TOKENIZER)
    assert all(fact in str(caught.value) for fact in [path.name, step, *facts])


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"use_vlln": False}, "use_vlln is False"),
        ({"noise_s": 0.9}, "noise_s is 0.9"),
        ({"state_history_length": 2}, "state_history_length is 2"),
        ({"use_alternate_vl_dit": False}, "use_alternate_vl_dit is False"),
        ({"select_layer": 4}, "language.depth is 3 by the tensors, 4 by config.json (select_layer)"),
        ({"max_action_dim": 13}, "action_dim is 12 by action_head.action_"),
        ({"action_horizon": "8"}, "action_horizon is '8'"),
        ({"num_inference_timesteps": 0}, "num_inference_timesteps is 0"),
        ({"image_target_size": [32, 64]}, "image_target_size is [32, 64]"),
    ],
)
def test_settings_of_nvidias_config_that_vlafit_does_not_compute_are_named(
    changes: dict[str, object], fact: str, tmp_path: Path
):
    save(write_nvidia_groot(tmp_path), tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(tmp_path, config=GROOT_CHAT)
    assert fact in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_config", "depth", [3]),
        ("vision_config", "num_heads", "2"),
        ("vision_config", "deepstack_visual_indexes", [1, None]),
        ("vision_config", "num_position_embeddings", -36),
        ("text_config", "hidden_size", True),
    ],
)
def test_sizes_of_the_backbone_that_are_no_numbers_are_named(
    section: str, key: str, value: object, tmp_path: Path
):
    save(write_nvidia_groot(tmp_path), tmp_path)
    path = tmp_path / "tiny_backbone" / "config.json"
    values = json.loads(path.read_text())
    values[section][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=rf"{key} is .*whole number"):
        checkpoints.load(tmp_path, tokenizer=TOKENIZER)


def test_the_row_of_an_embodiment_comes_from_the_processors_and_an_unknown_tag_is_noted(folder: Path):
    edit_step(folder / "policy_preprocessor.json", "groot_n1_7_pack_inputs_v1", embodiment_tag="libero_sim")
    policy = checkpoints.inspect(folder, config=GROOT_CHAT).policy
    assert policy.config.embodiment_rows == (2,)
    edit_step(folder / "policy_preprocessor.json", "groot_n1_7_pack_inputs_v1", embodiment_tag="my_arm")
    read = checkpoints.inspect(folder, config=GROOT_CHAT)
    assert read.policy.config.embodiment_rows == (0,) and "'my_arm'" in " ".join(read.report.notes)
    fresh = checkpoints.load(
        folder, config={**GROOT_CHAT, "embodiment_rows": [11]}, fresh=["*coder.*.layers.11.*"]
    )
    assert fresh.policy.config.embodiment_rows == (11,)
    used = {
        info.name for info in fresh.policy.parts() if ".layers.11." in info.name and "coder." in info.name
    }
    assert set(fresh.report.fresh) == used


def test_a_new_embodiment_starts_fresh_by_number_and_one_that_is_not_in_use_is_named(
    loaded: checkpoints.Loaded, folder: Path
):
    config = {"embodiment_rows": [11]}
    new = checkpoints.load(folder, tokenizer=TOKENIZER, config=config, fresh=["embodiment:11"])
    parts = {
        info.name for info in new.policy.parts() if info.part == "projections" and ".layers.11." in info.name
    }
    assert set(new.report.fresh) == parts and len(parts) == 14
    before = dict(loaded.policy.named_parameters())
    changed = {name for name, p in new.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in parts if name.endswith("weight")} | {
        name for name in parts if before[name].any() and name.endswith("bias")
    }
    bare = checkpoints.inspect(folder, config=GROOT_CHAT | config, fresh=["embodiment:11"])
    assert set(bare.report.fresh) == parts
    for number, fact in ((12, "embodiment_rows is .11."), (32, "0 to 31")):
        with pytest.raises(WeightsError, match=f"embodiment.{number}.*{fact}"):
            checkpoints.inspect(folder, config=GROOT_CHAT | config, fresh=[f"embodiment:{number}"])


def test_cameras_come_in_lerobots_order(folder: Path):
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.codec is not None and loaded.codec.config.cameras == ("front", "wrist")
    edit_step(
        folder / "policy_preprocessor.json",
        "groot_n1_7_pack_inputs_v1",
        video_modality_keys=["wrist", "front"],
    )
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.codec is not None and loaded.codec.config.cameras == ("wrist", "front")


def test_without_the_base_the_sizes_come_from_tensors_and_the_caller(folder: Path):
    shutil.rmtree(folder / "tiny_base")
    shutil.rmtree(folder / "tiny_backbone")
    told: dict[str, object] = {
        **GROOT_CHAT, "vision.heads": 2, "vision.deepstack": [1, 2], "language.sections": [4, 2, 2],
        "expert.heads": 4, "expert.memory_heads": 4,
    }  # fmt: skip
    with pytest.raises(WeightsError, match=r"determine 'vision.heads'.*vision.heads=N"):
        checkpoints.inspect(folder)
    assert checkpoints.inspect(folder, config=told).policy.config.language.depth == 3


def test_another_programs_config_beside_the_weights_is_refused(folder: Path):
    edit(folder / "config.json", type="smolvla")
    with pytest.raises(WeightsError, match=r"type 'smolvla'.*groot"):
        checkpoints.inspect(folder)


def test_a_tokenizer_without_the_marks_of_a_chat_turn_is_named(folder: Path, tmp_path: Path):
    words = Path(shutil.copytree(TOKENIZER, tmp_path / "words"))
    text = (words / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (words / "tokenizer.json").write_text(text)
    with pytest.raises(WeightsError, match=r"no token '<\|im_start\|>'"):
        checkpoints.load(folder, tokenizer=words)


def test_what_lerobot_cannot_hold_is_refused_with_reasons(loaded: checkpoints.Loaded):
    policy, codec = loaded.policy, loaded.codec
    assert isinstance(policy, Groot) and codec is not None
    assert write_lerobot.refusals(policy, codec) == []
    other = codec.with_changes(config=replace(codec.config, normalisation="min_max", framing="openpi"))
    reasons = " ".join(write_lerobot.refusals(policy, other))
    assert "'groot_min_max'" in reasons and "'min_max'" in reasons and "'openpi'" in reasons
    for changes, fact in (
        ({"attend_padding": False}, "attends to padding"),
        ({"embodiment_rows": (1, 2)}, "2 embodiments"),
        ({"chat": replace(policy.config.chat, pad=0)}, "chat turn"),
    ):
        changed = groot.build(replace(policy.config, **changes), "meta")
        assert fact in " ".join(write_lerobot.refusals(changed, codec))


def test_names_go_there_and_back_for_every_parameter(loaded: checkpoints.Loaded):
    for map in (names.NAMES, write_lerobot.NAMES):
        for name, _ in loaded.policy.named_parameters():
            assert map.policy_name(map.file_name(name)) == name
            layer = name.rpartition(".")[0]
            assert map.file_name(f"{layer}.lora_A.weight").startswith(map.file_name(name).rpartition(".")[0])


def test_adapters_are_refused_where_lerobot_and_nvidia_have_no_layer_for_them(loaded: checkpoints.Loaded):
    policy = loaded.policy
    assert isinstance(policy, Groot)
    assert names.table_refusals(["expert.layers.0.attn.q_proj", "memory.layers.1.mlp.fc1"]) == []
    for layer in ("state_encoder.first.layers.10", "vision.patch_embedding"):
        assert layer in names.table_refusals(["expert.layers.0.attn.q_proj", layer])[0]
    public = groot.build(SIZES["groot"], "meta")
    assert write_lerobot.adapter_refusals(public, ["expert.layers.0.attn.q_proj"]) == []
    assert "--merge" in write_lerobot.adapter_refusals(policy, ["expert.layers.0.attn.q_proj"])[0]
