"""X-VLA's folders: LeRobot's in both layouts and the authors', read exactly and written back."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlafit
from tests.policies.test_xvla import CONFIG
from vlafit import checkpoints
from vlafit.checkpoints.export import write
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.checkpoints.formats.lerobot.names import XVLA as NAMES
from vlafit.codec.images import FRAMINGS
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.errors import ConfigError, VlafitError, WeightsError
from vlafit.policies import xvla
from vlafit.policies._common import PIXEL_MEAN, imagenet_normalised
from vlafit.types import Observation

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_xvla"
SQUARE = {"image_size": 64}  # the recorded frames are 64x96, and LeRobot took them as they were
POSITIONS = "model.transformer.pos_emb"
AUTHORS = {
    "hidden_size", "depth", "num_heads", "mlp_ratio", "num_domains", "len_soft_prompts", "dim_time",
    "max_len_seq", "use_hetero_proj", "action_mode", "use_proprio", "florence_config",
}  # fmt: skip


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(FIXTURE / "model.safetensors")


def old_layout(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of December 2025, as recorded."""
    made = {}
    for name, (source, how) in json.loads((FIXTURE / "vendored_names.json").read_text()).items():
        if how == "unused":
            made[name] = torch.zeros(source)
        else:
            made[name] = (stored[source].T if how == "transposed" else stored[source]).contiguous()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy whose cameras give squares, with its tokenizer inside."""
    made = Path(shutil.copytree(FIXTURE, tmp_path / "checkpoint"))
    shutil.copytree(made / "char_tokenizer", made / "tokenizer")
    for name in ("config.json", "policy_preprocessor.json"):
        text = (made / name).read_text()
        values = json.loads(text)
        tables = [values.get("input_features", {})]
        tables += [step["config"].get("features", {}) for step in values.get("steps", ())]
        for table in tables:
            for feature in table.values():
                if feature["type"] == "VISUAL":
                    feature["shape"] = [3, 64, 64]
        for step in values.get("steps", ()):
            if step["registry_name"] == "tokenizer_processor":
                step["config"]["tokenizer_name"] = "tokenizer"
                step["artifacts"] = {"tokenizer_name": "tokenizer"}
        (made / name).write_text(json.dumps(values))
    return made


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def step_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(step["config"] for step in values["steps"] if step["registry_name"] == name)


def assert_exact(policy, stored: dict[str, Tensor]) -> None:
    assert len(list(policy.parameters())) == len(stored)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, stored[NAMES.file_name(name)].view_as(parameter)), name


# --------------------------------------------------------------------------------------------------- weights


def test_lerobots_folder_is_read_exactly(stored):
    loaded = vlafit.load_checkpoint(FIXTURE, config=SQUARE)
    assert loaded.policy.config == replace(CONFIG, domain=3) and loaded.policy.steps == 10  # the processors'
    assert (loaded.report.form, loaded.report.family, loaded.report.unused) == ("LeRobot", "xvla", ())
    assert_exact(loaded.policy, stored)
    assert loaded.codec is None and "64x96" in loaded.report.codec
    with pytest.raises(WeightsError, match=r"determine image_size; LeRobot takes its frames of 64x96"):
        vlafit.load_policy(FIXTURE)


def test_files_of_december_2025_and_the_authors_own_folder_hold_the_same_weights(stored, tmp_path: Path):
    old = old_layout(stored)
    assert {"model.vlm.image_projection", "model.vlm.language_model.final_logits_bias"} <= set(old)
    shutil.copy(FIXTURE / "config.json", tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    loaded = vlafit.load_checkpoint(tmp_path, config=SQUARE)
    assert_exact(loaded.policy, stored)
    assert loaded.report.unused == ("model.vlm.language_model.final_logits_bias",)
    values = json.loads((FIXTURE / "config.json").read_text())
    own = {key: value for key, value in values.items() if key in AUTHORS} | {"num_actions": 8}
    (tmp_path / "config.json").write_text(json.dumps(own | {"model_type": "xvla"}))
    save_file({name.removeprefix("model."): t for name, t in old.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="determine image_size, views, max_tokens. Give them"):
        vlafit.load_policy(tmp_path)
    policy = vlafit.load_policy(tmp_path, config=SQUARE | {"views": 3, "max_tokens": 12})
    assert policy.config == CONFIG
    assert_exact(policy, stored)


def test_transformers_keys_of_florence_config_are_the_same_sizes(tmp_path: Path, stored):
    def native(values: dict[str, Any]) -> None:
        vision = values["florence_config"]["vision_config"]
        vision["embed_dim"] = vision.pop("dim_embed")
        vision["max_position_embeddings"] = vision.pop("image_pos_embed")["max_pos_embeddings"]
        vision["max_temporal_embeddings"] = vision.pop("visual_temporal_embedding")["max_temporal_embeddings"]
        del vision["image_feature_source"]

    shutil.copy(FIXTURE / "config.json", tmp_path)
    edit(tmp_path / "config.json", native)
    shared = dict(stored)
    shared["model.vlm.language_model.shared.weight"] = shared.pop(
        NAMES.file_name("language.embed_tokens.weight")
    )
    save_file(shared, tmp_path / "model.safetensors")
    assert checkpoints.inspect(tmp_path, config=SQUARE).policy.config == CONFIG
    assert_exact(vlafit.load_policy(tmp_path, config=SQUARE), stored)


def test_the_public_size_has_lerobots_keys_and_shapes():
    wanted = json.loads((FIXTURE / "full_keys.json").read_text())
    policy = xvla.build(xvla.SIZES["xvla"], "meta")
    mine = {NAMES.file_name(name): list(p.shape) for name, p in policy.named_parameters()}
    mine[POSITIONS] = [1, *mine[POSITIONS]]
    mine["model.vlm.language_model.shared.weight"] = mine[NAMES.file_name("language.embed_tokens.weight")]
    assert mine == wanted


REFUSED = {
    "another family's config": (lambda v: v.update(type="pi0"), "type 'pi0', the tensors are those of xvla"),
    "without Florence": (lambda v: v.pop("florence_config"), "has no florence_config"),
    "without a size": (lambda v: v.pop("num_heads"), "num_heads is missing"),
    "no state": (lambda v: v.update(use_proprio=False), "use_proprio is False; only true"),
    "another space": (lambda v: v.update(action_mode="ee7d"), "action_mode 'ee7d' is not known"),
    "another activation": (
        lambda v: v["florence_config"]["text_config"].update(activation_function="relu"),
        "text_config: activation_function is 'relu'; only 'gelu'",
    ),
    "other positions": (
        lambda v: v["florence_config"]["vision_config"]["image_pos_embed"].update(type="sine"),
        "image_pos_embed .* only type 'learned_abs_2d'",
    ),
    "no square": (lambda v: v.update(resize_imgs_with_padding=[64, 96]), r"\[64, 96\]; only squares"),
    "other sizes": (lambda v: v.update(depth=3), "missing .*model.transformer.blocks.2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_computed_are_refused_by_key(case: str, tmp_path: Path):
    change, message = REFUSED[case]
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, tmp_path)
    edit(tmp_path / "config.json", change)
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        checkpoints.inspect(tmp_path, config=SQUARE)


# ------------------------------------------------------------------------------------------------- processors


def test_the_processors_make_the_recorded_inputs(folder: Path):
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.embodiment_id == 3
    assert (codec.config.prompt, codec.config.framing, codec.config.mask_padding) == ("text", "xvla", False)
    recorded = load_file(FIXTURE / "processors" / "processor_io.safetensors")
    tasks = json.loads((FIXTURE / "processors" / "processor_io.json").read_text())["tasks"]
    frame = np.zeros((64, 64, 3), np.uint8)
    state = recorded["in.observation.state"][0].numpy()
    encoded = codec.encode(Observation({"image": frame, "image2": frame}, state, tasks[0]))
    assert encoded.tokens.tolist() == recorded["pre.observation.language.tokens"][0].tolist()
    assert encoded.token_mask.tolist() == recorded["pre.observation.language.attention_mask"][0].tolist()
    assert int(encoded.embodiment_id) == int(recorded["pre.domain_id"][0])
    np.testing.assert_allclose(encoded.state, recorded["pre.observation.state"][0], atol=1e-6)
    for name in ("image", "image2"):
        raw = recorded[f"in.observation.images.{name}"]
        made = imagenet_normalised(raw / (255 if raw.max() > 1 else 1) * 2 - 1)
        torch.testing.assert_close(made, recorded[f"pre.observation.images.{name}"], rtol=0.0, atol=1e-5)
    with pytest.raises(VlafitError, match="the policy takes 12"):  # LeRobot would cut it off
        codec.encode(Observation({"image": frame, "image2": frame}, state, tasks[1]))


def test_a_domain_that_the_caller_gives_takes_the_place_of_the_processors(folder: Path):
    assert vlafit.load_checkpoint(folder, config={"domain": 1}).codec.embodiment_id == 1
    edit(folder / "policy_preprocessor.json", lambda v: step_of(v, "xvla_add_domain_id").update(domain_id=5))
    with pytest.raises(WeightsError, match="domain_id is 5, and the policy's domains are 0 to 4"):
        vlafit.load_checkpoint(folder)
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"].pop(5))
    assert vlafit.load_checkpoint(folder).codec.embodiment_id == 0


STEPS = {
    "images not normalised": (lambda v: v["steps"].pop(4), "0 steps are xvla_imagenet_normalize"),
    "padding by the longest": (
        lambda v: step_of(v, "tokenizer_processor").update(padding="longest"),
        "padding is 'longest'; X-VLA reads the padding",
    ),
    "only some images": (
        lambda v: step_of(v, "xvla_image_to_float").update(image_keys=["observation.images.image"]),
        "image_keys is",
    ),
    "normalised before scaled": (
        lambda v: v["steps"].insert(3, v["steps"].pop(4)),
        "xvla_image_to_float.* runs after .*xvla_imagenet_normalize",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_are_not_repeated_are_refused_by_name(case: str, folder: Path):
    change, message = STEPS[case]
    edit(folder / "policy_preprocessor.json", change)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: v.update(input_features=0.5), "input_features is 0.5"),
        (
            "config.json",
            lambda v: v["input_features"]["observation.images.image"].update(shape=[3, 64, float("inf")]),
            "64xinf",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step_of(v, "rename_observations_processor").update(rename_map=0.5),
            "rename_map is 0.5",
        ),
        (
            "policy_postprocessor.json",
            lambda v: step_of(v, "unnormalizer_processor")["norm_map"].update(ACTION={"a": 1}),
            "ACTION is normalised by {'a': 1}",
        ),
    ],
)
def test_settings_of_another_type_are_named(
    file: str, change: Callable[[dict[str, Any]], object], message: str, folder: Path
):
    edit(folder / file, change)
    with pytest.raises(WeightsError, match=message):
        checkpoints.declaration(folder)
        vlafit.load_checkpoint(folder)


def test_without_its_tokenizer_the_folder_says_which_and_takes_the_callers(folder: Path):
    shutil.rmtree(folder / "tokenizer")
    assert checkpoints.wants_tokenizer(folder)
    loaded = vlafit.load_checkpoint(folder)
    assert loaded.codec is None and "tokenizer" in loaded.report.codec
    assert vlafit.load_checkpoint(folder, tokenizer=FIXTURE / "char_tokenizer").codec is not None
    other = load_tokenizer(FIXTURE / "char_tokenizer")
    with pytest.raises(WeightsError, match="pads with 0, and the policy reads padding of 1"):
        vlafit.load_checkpoint(folder, tokenizer=type(other)(other.backend, 0, other.bos, other.eos))


def test_a_new_domain_starts_fresh_by_number_and_all_others_keep_their_weights(stored):
    loaded = checkpoints.load(FIXTURE, config=SQUARE, fresh=["embodiment:4"])
    tables = {"action_encoder.fc.weight", "action_encoder.bias.weight", "action_decoder.fc.weight"}
    tables |= {"action_decoder.bias.weight", "soft_prompts.weight"}
    assert set(loaded.report.fresh) == tables
    said = loaded.report.text()
    assert "254 tensors used" in said and "soft_prompts.weight (row 4)" in said
    for name, parameter in loaded.policy.named_parameters():
        before = stored[NAMES.file_name(name)].view_as(parameter)
        if name in tables:
            assert torch.equal(parameter[:4], before[:4]) and not torch.equal(parameter[4], before[4])
        else:
            assert torch.equal(parameter, before)
    assert set(checkpoints.inspect(FIXTURE, config=SQUARE, fresh=["embodiment:4"]).report.fresh) == tables
    with pytest.raises(WeightsError, match="no embodiment 5; .* 0 to 4"):
        checkpoints.load(FIXTURE, config=SQUARE, fresh=["embodiment:5"])
    with pytest.raises(WeightsError, match="'embodiment:libero' must be embodiment:N"):
        checkpoints.load(FIXTURE, config=SQUARE, fresh=["embodiment:libero"])


def test_a_run_keeps_its_domain_and_another_one_cannot_be_asked_for_without_effect(
    folder: Path, tmp_path: Path
):
    loaded = vlafit.load_checkpoint(folder, config={"domain": 1})
    vlafit.save_checkpoint(loaded.policy, tmp_path / "saved", codec=loaded.codec)
    assert vlafit.load_checkpoint(tmp_path / "saved").codec.embodiment_id == 1
    with pytest.raises(WeightsError, match="domain would have no effect: codec.json names the embodiment 1"):
        vlafit.load_checkpoint(tmp_path / "saved", config={"domain": 2})


# ----------------------------------------------------------------------------------------------------- export


def test_an_export_is_lerobots_folder_again(folder: Path, stored, tmp_path: Path):
    loaded = vlafit.load_checkpoint(folder)
    assert lerobot_export.refusals(loaded.policy, loaded.codec) == []
    out = tmp_path / "out"
    out.mkdir()
    lerobot_export.write(out, loaded.policy, loaded.codec)
    written = load_file(out / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert json.loads((out / name).read_text()) == json.loads((folder / name).read_text())
    mine, theirs = (json.loads((where / "config.json").read_text()) for where in (out, folder))
    assert mine.keys() == theirs.keys() - {"pretrained_revision"}
    different = {key for key in mine if mine[key] != theirs[key]}
    assert different == {"resize_imgs_with_padding"}  # null there: frames as they are
    again = vlafit.load_checkpoint(out)
    assert (again.policy.config, again.codec.config) == (loaded.policy.config, loaded.codec.config)
    assert again.codec.embodiment_id == 3


def test_an_export_says_how_the_padding_of_frames_that_are_no_squares_differs(folder: Path, tmp_path: Path):
    policy, codec, _, _ = vlafit.load_checkpoint(folder)
    robot, size = codec.embodiment, codec.config.image_size
    for height, said in ((size, False), (size - 4, True)):
        cameras = tuple(replace(c, shape=(height, size, 3)) for c in robot.cameras)
        other = codec.with_changes(embodiment=replace(robot, cameras=cameras))
        notes = str(write(policy, other, "lerobot", tmp_path / str(height), "here").notes)
        assert (f"no squares ({', '.join(c.name for c in cameras)})" in notes) == said, height
        assert ("0.47 of 255" in notes) == said
    exact = np.array(PIXEL_MEAN) * 255  # what LeRobot's zeros after the mean was subtracted stand for
    assert 0.46 < np.abs(np.array(FRAMINGS["xvla"].fill) - exact).max() < 0.475


def views_in_lerobot(values: dict[str, Any]) -> int:
    """LeRobot 0.6.1, configuration_xvla.py, validate_features: a listed empty camera counts once more."""
    listed = sum(one["type"] == "VISUAL" for one in values["input_features"].values())
    return max(values["num_image_views"] or 0, listed + values["empty_cameras"])


def test_an_empty_camera_slot_gives_lerobot_no_view_more(folder: Path, tmp_path: Path):
    loaded = vlafit.load_checkpoint(folder)
    slots = replace(loaded.codec.config, cameras=(*loaded.codec.config.cameras, ""))
    codec = loaded.codec.with_changes(config=slots)
    out = tmp_path / "out"
    write(loaded.policy, codec, "lerobot", out, "here")
    assert views_in_lerobot(json.loads((out / "config.json").read_text())) == loaded.policy.config.views == 3
    again = vlafit.load_checkpoint(out)
    assert again.policy.config == loaded.policy.config and "views" not in str(again.report.notes)
    assert [name for name in again.codec.config.cameras if name] == [n for n in slots.cameras if n]


def test_empty_cameras_that_lerobot_counts_twice_are_noted(folder: Path):
    """So LeRobot saves a policy of 2 cameras and an empty one, and then loads it with 4 views."""
    empty = {"type": "VISUAL", "shape": [3, 64, 64]}
    edit(
        folder / "config.json",
        lambda v: v["input_features"].update({"observation.images.empty_camera_0": empty}),
    )
    edit(folder / "config.json", lambda v: v.update(empty_cameras=1))
    loaded = vlafit.load_checkpoint(folder)
    assert loaded.policy.config.views == 3
    assert any("4 views" in note and "views = 4" in note for note in loaded.report.notes)
    assert "views" not in str(vlafit.load_checkpoint(folder, config={"views": 4}).report.notes)


def test_what_lerobot_cannot_hold_is_refused(folder: Path):
    loaded = vlafit.load_checkpoint(folder, config={"attends_padding": False})
    assert "attends_padding" in lerobot_export.refusals(loaded.policy, loaded.codec)[0]
    other = xvla.build(xvla.SIZES["xvla-tiny"])
    assert any("pad_token" in reason for reason in lerobot_export.refusals(other, loaded.codec))


def test_widths_are_changed_by_fresh_projections_only(folder: Path):
    with pytest.raises(WeightsError, match="resize='fresh'"):
        vlafit.load_policy(folder, config={"state_dim": 24})
    with pytest.raises(WeightsError, match="slice action_encoder.fc.weight: .* resize='fresh'"):
        checkpoints.load(folder, config={"state_dim": 24}, resize="keep")
    policy = checkpoints.load(folder, config={"state_dim": 24}, resize="fresh").policy
    assert policy.config.state_dim == 24
    with pytest.raises(ConfigError, match="action_dim is 7"):
        checkpoints.load(folder, config={"action_dim": 7}, resize="fresh")
