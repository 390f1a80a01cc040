"""NVIDIA's processors of GR00T N1.7: the codec of each embodiment, against what LeRobot 0.6.1 recorded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.checkpoints.forms import GROOT, GROOT_CHAT, save, write_nvidia_groot
from vlafit import checkpoints, cli
from vlafit.checkpoints.declaration import InputForm
from vlafit.checkpoints.export import export
from vlafit.codec import Codec
from vlafit.codec.described import learned
from vlafit.codec.images import Framing, fit_image
from vlafit.codec.rotations import to_matrices
from vlafit.errors import CodecError, VlafitError, WeightsError
from vlafit.recipe import AdaptRecipe, DataRecipe, PolicyRecipe, Recipe
from vlafit.train import preflight
from vlafit.train.checkpoint_codec import takes_tokenizer
from vlafit.train.data import open_data
from vlafit.train.initial_codec import in_squares
from vlafit.types import Observation, Sample

FILES = Path(__file__).parents[1] / "fixtures" / "groot_processors"
TOKENIZER = GROOT / "char_tokenizer"
LIBERO, DROID, G1 = (
    "libero_sim",
    "oxe_droid_relative_eef_relative_joint",
    "unitree_g1_full_body_with_waist_height_nav_cmd",
)
ROWS = {LIBERO: 2, DROID: 24, G1: 25}
STEPS = {LIBERO: 5, DROID: 8, G1: 6}
CHAT = [word for key, value in GROOT_CHAT["chat"].items() for word in ("--config", f"chat.{key}={value}")]
BOUND = 1e-6  # times the largest number: LeRobot computes in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nvidia")
    save(write_nvidia_groot(made), made)
    edit(made / "config.json", image_target_size=[32, 32])
    for name in ("processor_config.json", "statistics.json", "embodiment_id.json"):
        shutil.copy(FILES / name, made)
    return made


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture(scope="module")
def io() -> dict[str, NDArray]:
    return load_file(FILES / "io.safetensors")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_settings(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    change(content["processor_kwargs"])
    path.write_text(json.dumps(content))


def codec_of(folder: Path, tag: str) -> Codec:
    codec = checkpoints.load(folder, tokenizer=TOKENIZER, assets=tag).codec
    assert codec is not None
    return codec


def seen(codec: Codec, state: NDArray) -> Observation:
    frames = {c.name: np.zeros(c.shape, np.uint8) for c in codec.embodiment.cameras}
    return Observation(frames, state, "Pick up the red block!")


def assert_near(got: NDArray, wanted: NDArray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=BOUND * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("tag", [LIBERO, DROID, G1])
def test_states_actions_and_answers_are_those_that_lerobot_recorded(
    tag: str, folder: Path, io: dict[str, NDArray]
) -> None:
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER, assets=tag)
    codec = loaded.codec
    assert codec is not None and codec.embodiment.name == tag
    assert loaded.policy.config.embodiment_rows == (ROWS[tag],) == tuple(io[f"{tag}.embodiment_id"][:1])
    assert codec.config.prompt == "groot" and codec.config.answered == STEPS[tag]
    for row in range(3):
        state = io[f"{tag}.state"][row]
        observation = seen(codec, state)
        assert_near(codec.encode(observation).state, io[f"{tag}.normal_state"][row])
        decoded = codec.decode(io[f"{tag}.answer"][row], observation)
        assert_near(decoded.actions, io[f"{tag}.decoded"][row])
        if f"{tag}.chunk" not in io:
            continue
        actions = np.zeros((8, codec.embodiment.action.shape[0]), np.float32)
        actions[: STEPS[tag]] = io[f"{tag}.chunk"][row]
        encoded = codec.encode(Sample(observation, actions, np.ones(8, bool), ("set", "e", 0)))
        assert encoded.actions is not None and encoded.action_mask is not None
        assert_near(encoded.actions, io[f"{tag}.normal_chunk"][row])
        np.testing.assert_array_equal(encoded.action_mask, io[f"{tag}.mask"][row] > 0)


def test_a_pose_that_is_relative_to_the_hand_is_encoded_as_it_was_decoded(folder: Path, io) -> None:
    """LeRobot does not train on it; NVIDIA's program does, by the inverse of the decoding."""
    codec = codec_of(folder, DROID)
    for row in range(3):
        observation = seen(codec, io[f"{DROID}.state"][row])
        answer = io[f"{DROID}.answer"][row].clip(-1, 1)
        actions = codec.decode(answer, observation).actions
        again = codec.encode_actions(actions, observation)
        wide = float((codec._action.decode(np.ones((8, 12))) - codec._action.decode(-np.ones((8, 12)))).min())
        bound = 100 * np.finfo(np.float32).eps * 2 * 5 / wide  # numbers of up to 5 are divided by the range
        others = [0, 1, 2, 9, 10, 11]
        np.testing.assert_allclose(again[:, others], answer[:, others], atol=bound)
        # Six numbers of an answer need not be orthonormal, those of an action are: one rotation, though.
        turned = [codec._action.decode(values.astype(np.float64))[:, 3:9] for values in (answer, again)]
        one, other = (to_matrices(values, "rot6d_rows") for values in turned)
        inside = np.abs(again[:, 3:9]).max(axis=1) < 1  # others are clipped, as NVIDIA clips them
        np.testing.assert_allclose(one[inside], other[inside], atol=100 * bound)


def test_groups_are_named_in_order_and_what_is_learned_is_said(folder: Path, capsys) -> None:
    codec = codec_of(folder, G1)
    assert codec.embodiment.state.labels == (
        *(f"left_leg.{n}" for n in range(4)), *(f"left_arm.{n}" for n in range(3)),
        "left_hand.0", "left_hand.1",
    )  # fmt: skip
    assert codec.config.cameras == ("ego_view",)
    assert codec_of(folder, DROID).config.cameras == ("wrist_image_left", "exterior_image_1_left")
    assert learned(codec) == [
        "action: dimensions relative to those of the state: 0 to 4, 1 to 5, 2 to 6",
        "action: dimensions normalised apart: 3 by nvidia_min_max, 3 by nvidia_quantile",
        "action: statistics of each step",
        "action: the first 6 of 8 steps",
    ]
    assert cli.main(["inspect", str(folder), *CHAT]) == 0
    assert "statistics of 3 embodiments" in capsys.readouterr().out


def test_sines_z_scores_and_constants_follow_isaac_gr00t(own: Path) -> None:
    """LeRobot reads neither sin_cos_embedding_keys nor mean_std_embedding_keys; formulas by hand."""

    def change(settings: dict[str, Any]) -> None:
        settings["apply_sincos_state_encoding"] = True
        robot = settings["modality_configs"][G1]
        robot["state"] |= {"sin_cos_embedding_keys": ["left_arm"], "mean_std_embedding_keys": ["left_hand"]}
        robot["action"]["mean_std_embedding_keys"] = ["base_height_command"]

    edit_settings(own, change)
    path = own / "statistics.json"
    numbers = json.loads(path.read_text())
    numbers[G1]["state"]["left_leg"]["q01"][0] = 1.0
    numbers[G1]["state"]["left_leg"]["q99"][0] = 1.0 + 5e-6  # np.isclose says equal
    path.write_text(json.dumps(numbers))
    codec = codec_of(own, G1)
    state = np.linspace(-1, 1, 9).astype(np.float32)
    got = codec.encode(seen(codec, state)).state
    hand = numbers[G1]["state"]["left_hand"]
    z = (state[7:].astype(np.float64) - hand["mean"]) / hand["std"]
    angles = state[4:7].astype(np.float64)
    assert got[0] == 0.0
    np.testing.assert_allclose(got[4:12], [*np.sin(angles), *np.cos(angles), *z], rtol=1e-6)
    action = codec.decode(np.full((8, 12), 3.0), seen(codec, state)).actions
    base = numbers[G1]["action"]["base_height_command"]
    np.testing.assert_allclose(action[:, 5], 3.0 * base["std"][0] + base["mean"][0], rtol=1e-6)
    chunk = codec.encode_actions(action, seen(codec, state))
    assert np.all(chunk[:, 5] == 1.0)  # z-scores of actions are clipped where they are encoded only


def test_frames_are_those_of_torchvision_s_resize_and_crop() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for height, width, size in ((60, 80, 32), (20, 16, 32), (256, 256, 224)):
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

        def resized(image: Any, side: int) -> Any:
            return torch.nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True)

        side = size * 230 // 256
        first = round((size - side) / 2)
        square = resized(torch.from_numpy(frame).permute(2, 0, 1)[None], size)
        wanted = resized(square[..., first : first + side, first : first + side], size)
        np.testing.assert_array_equal(fit_image(frame, size, "nvidia"), wanted[0].permute(1, 2, 0).numpy())


WAYS = {"plain": (0.0, False), "share": (0.95, False), "whole": (1.0, False), "box": (0.95, True)}
"""As record_frames.py has them; a plain crop is 28 of 32 pixels."""


def test_frames_are_those_that_lerobot_recorded_with_and_without_albumentations() -> None:
    frames = load_file(FILES / "frames.safetensors")
    for key, wanted in frames.items():
        kind, way, name = key.split(".") if key.count(".") == 2 else ("frame", "", "")
        if kind != "frame":
            framing: Framing = "nvidia_area" if kind == "area" else "groot"
            got = fit_image(frames[f"frame.{name}"], 32, framing, *WAYS[way])
            np.testing.assert_array_equal(got, wanted, err_msg=key)


def test_a_letter_box_of_nvidia_s_other_program_comes_before_its_resizing(own: Path) -> None:
    frame = np.random.default_rng(2).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    boxed = np.zeros((50, 50, 3), np.uint8)
    boxed[15:35] = frame
    np.testing.assert_array_equal(
        fit_image(frame, 32, "nvidia", 0.0, letter_box=True), fit_image(boxed, 32, "nvidia")
    )
    edit_settings(own, lambda s: s.update(letter_box_transform=True, image_crop_size=[24, 24]))
    config = codec_of(own, LIBERO).config
    assert (config.framing, config.crop, config.letter_box) == ("nvidia", 0.75, True)


def test_albumentations_crop_a_share_and_keep_the_aspect_of_frames(own: Path, tmp_path: Path) -> None:
    edit_settings(
        own, lambda s: s.update(use_albumentations=True, crop_fraction=0.95, shortest_image_edge=32)
    )
    codec = codec_of(own, LIBERO)
    assert (codec.config.framing, codec.config.crop) == ("nvidia_area", 0.95)
    form = checkpoints.declaration(own).form
    assert form is not None and (form.framing, form.crop, form.letter_box) == ("nvidia_area", 0.95, False)
    wide = replace(codec.embodiment, cameras=tuple(
        replace(camera, shape=(24, 32, 3)) for camera in codec.embodiment.cameras
    ))  # fmt: skip
    with pytest.raises(CodecError, match=r"frames of 24x32.*use_albumentations.*letter_box_transform"):
        codec.with_changes(embodiment=wide)
    boxed = codec.with_changes(config=replace(codec.config, letter_box=True), embodiment=wide)
    boxed.save(tmp_path)
    assert Codec.load(tmp_path).config == boxed.config
    edit_settings(own, lambda s: s.update(shortest_image_edge=48))
    with pytest.raises(WeightsError, match="shortest_image_edge is 48, and 32"):
        codec_of(own, LIBERO)
    edit_settings(own, lambda s: (s.pop("crop_fraction"), s.update(shortest_image_edge=None)))
    assert codec_of(own, LIBERO).config.crop == 0.95  # NVIDIA's program's own


def test_without_a_name_none_of_several_is_chosen_and_the_only_one_is(own: Path) -> None:
    loaded = checkpoints.load(own, tokenizer=TOKENIZER)
    assert loaded.codec is None and f"{LIBERO}, {DROID}, {G1}" in loaded.report.codec
    assert loaded.policy.config.embodiment_rows == (10,)
    with pytest.raises(WeightsError, match=r"no statistics of 'libero_sin'.*did you mean 'libero_sim'"):
        checkpoints.load(own, tokenizer=TOKENIZER, assets="libero_sin")
    with pytest.raises(WeightsError, match="'chat'"):  # its tokens are told by a tokenizer, too
        checkpoints.load(own, assets=LIBERO)
    edit_settings(own, lambda settings: settings["modality_configs"].pop(DROID))
    edit_settings(own, lambda settings: settings["modality_configs"].pop(G1))
    only = checkpoints.load(own, tokenizer=TOKENIZER)
    assert only.codec is not None and only.codec.embodiment.name == LIBERO
    assert only.policy.config.embodiment_rows == (2,)


def _set(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings.update({key: value})


def _of(tag: str, modality: str, **values: object) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["modality_configs"][tag][modality].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("use_albumentations", "yes"), "use_albumentations is 'yes'"),
        (_set("image_crop_size", [40, 40]), r"image_crop_size is \[40, 40\], of 32 pixels"),
        (_set("clip_outliers", False), "clip_outliers is False"),
        (_set("novel", 1), "novel is 1; it is not known here"),
        (_set("max_action_horizon", 16), "max_action_horizon is 16, and 8"),
        (_of(DROID, "state", exclude_state=True), "state.exclude_state is True; it is not known here"),
        (_of(DROID, "video", delta_indices=[-15, 0]), r"video.delta_indices are \[-15, 0\]"),
        (_of(DROID, "action", delta_indices=[0, 2]), r"action.delta_indices are \[0, 2\]"),
        (_of(DROID, "video", action_configs=3), "video.action_configs is 3; it must be a list"),
        (_of(DROID, "action", modality_keys=["eef_9d"]), "action_configs must be a table for each"),
        (_of(DROID, "state", modality_keys=["eef_9d", "torso"]), "no statistics of state.torso"),
        (_of(DROID, "state", modality_keys=["eef_9d", "gripper_position"]), "to the state 'joint_position'"),
        (_of(DROID, "action", delta_indices=[0, 1, 2]), "has the shape"),
    ],
)  # fmt: skip
def test_what_is_not_repeated_or_damaged_is_named(
    change: Callable[[dict[str, Any]], object], message: str, own: Path
) -> None:
    edit_settings(own, change)
    with pytest.raises(VlafitError, match=message):
        checkpoints.load(own, tokenizer=TOKENIZER, assets=DROID)


def test_an_unknown_embodiment_has_no_row_and_vlafit_s_folder_keeps_the_codec(
    own: Path, tmp_path: Path
) -> None:
    for name in ("statistics.json",):
        content = json.loads((own / name).read_text())
        (own / name).write_text(json.dumps(content | {"mine": content[LIBERO]}))
    edit_settings(own, lambda s: s["modality_configs"].update(mine=s["modality_configs"][LIBERO]))
    with pytest.raises(WeightsError, match=r"embodiment 'mine' has the row None.*embodiment_rows"):
        checkpoints.load(own, tokenizer=TOKENIZER, assets="mine")
    loaded = checkpoints.load(own, {"embodiment_rows": [4]}, tokenizer=TOKENIZER, assets="mine")
    assert loaded.codec is not None and loaded.policy.config.embodiment_rows == (4,)
    checkpoints.save(loaded.policy, tmp_path / "saved", loaded.codec)
    again = checkpoints.load(tmp_path / "saved").codec
    assert again is not None and again.config == loaded.codec.config
    with pytest.raises(
        WeightsError, match="lerobot does not repeat this of its codec: action: the first 5 of 8"
    ):
        export(tmp_path / "saved", "lerobot", tmp_path / "out")


def test_a_tokenizer_in_the_folder_is_the_checkpoint_s_own(own: Path) -> None:
    declared = checkpoints.declaration(own)
    assert declared.tokenizer == "nvidia/Cosmos-Reason2-2B" and declared.own_tokenizer is None
    assert declared.named_statistics == (LIBERO, DROID, G1) and declared.form is not None
    shutil.copytree(TOKENIZER, own / "tokenizer")
    assert checkpoints.declaration(own).own_tokenizer == own / "tokenizer"
    assert checkpoints.load(own, assets=G1).codec is not None


def test_a_tokenizer_tells_the_chat_turn_of_a_backbone_that_is_not_the_public_one(own: Path) -> None:
    chosen = PolicyRecipe(checkpoint=str(own), tokenizer=str(TOKENIZER))
    declared = checkpoints.declaration(own)
    assert declared.tokenizer_tells and takes_tokenizer(own, chosen, declared, fitted=True)
    edit(own / "config.json", model_name="nvidia/Cosmos-Reason2-2B")
    declared = checkpoints.declaration(own)
    assert not declared.tokenizer_tells and not takes_tokenizer(own, chosen, declared, fitted=True)


def test_without_processors_the_tokenizer_tells_the_chat_turn_and_config_json_the_frames(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error asked for --tokenizer FOLDER, which then changed nothing."""
    for path in FILES.glob("*.json"):
        (own / path.name).unlink(missing_ok=True)
    edit(own / "config.json", image_crop_size=[28, 28])
    assert cli.main(["inspect", str(own)]) != 0 and "--tokenizer FOLDER" in capsys.readouterr().err
    assert cli.main(["inspect", str(own), "--tokenizer", str(TOKENIZER)]) == 0
    assert "policy.tokenizer (tiny_backbone in its files)" in capsys.readouterr().out
    chosen = PolicyRecipe(checkpoint=str(own), tokenizer=str(TOKENIZER))
    declared = checkpoints.declaration(own)
    assert takes_tokenizer(own, chosen, declared, fitted=True)
    assert declared.form == InputForm("groot", "nvidia_area", "prompt", 28 / 32)
    edit(own / "config.json", use_albumentations_transforms=False, formalize_language=False)
    assert checkpoints.declaration(own).form == InputForm("text", "nvidia", "prompt")
    edit(own / "config.json", use_albumentations_transforms="no")
    with pytest.raises(WeightsError, match="config.json: use_albumentations_transforms is 'no'"):
        checkpoints.declaration(own)
    (own / "config.json").unlink()
    assert checkpoints.declaration(own).form is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_tokenizer_is_taken_without_processors_whether_it_tells_the_chat_turn_or_not(
    own: Path, beside: bool
) -> None:
    for path in FILES.glob("*.json"):
        (own / path.name).unlink(missing_ok=True)
    edit(own / "config.json", image_crop_size=[28, 28])
    chosen = PolicyRecipe(checkpoint=str(own), tokenizer=str(TOKENIZER))
    if beside:  # a local copy of the public backbone
        marks = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
        edit(own / "tiny_backbone" / "config.json", **marks)
    else:
        shutil.rmtree(own / "tiny_backbone")
    declared = checkpoints.declaration(own)
    assert declared.tokenizer_tells != beside
    assert takes_tokenizer(own, chosen, declared, fitted=True) != beside


def test_what_is_checked_before_a_comparison_has_the_chat_turn_from_the_tokenizer_too(own: Path) -> None:
    """`vlafit train` took it, and `vlafit compare` asked for policy.config.chat."""
    recipe = Recipe(
        policy=PolicyRecipe(checkpoint=str(own), tokenizer=str(TOKENIZER)),
        data=DataRecipe(cards=("metaworld-faucet-open",), statistics="data"),
        adapt=AdaptRecipe(robot=True),
        strategy="expert",
    )
    policy = preflight.meta_policy(recipe, open_data(recipe.data, seed=0))
    assert policy.config.chat.pad == GROOT_CHAT["chat"]["pad"]


def test_frames_of_another_aspect_get_a_letter_box_where_a_codec_is_fitted(own: Path) -> None:
    edit_settings(own, lambda s: s.update(use_albumentations=True, shortest_image_edge=32))
    codec = codec_of(own, LIBERO)
    assert not in_squares(codec.config, codec.embodiment).letter_box
    wide = tuple(replace(camera, shape=(24, 32, 3)) for camera in codec.embodiment.cameras)
    assert in_squares(codec.config, replace(codec.embodiment, cameras=wide)).letter_box
    squeezed = replace(codec.config, framing="nvidia", crop=0.0)
    assert not in_squares(squeezed, replace(codec.embodiment, cameras=wide)).letter_box
