"""LeRobot's GR00T with statistics of groups: what its processors compute, and files that contradict them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.checkpoints.forms import GROOT
from tests.checkpoints.test_groot_processors import DROID, FILES, G1, LIBERO, ROWS, STEPS, assert_near, seen
from vlafit import checkpoints
from vlafit.checkpoints.export import write
from vlafit.codec import Codec
from vlafit.codec.described import learned
from vlafit.errors import WeightsError
from vlafit.types import Sample

GROUPED = FILES / "lerobot_grouped"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
PACK, DECODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_action_decode_v1"
CAMERAS = {
    LIBERO: ("image", "image2"),
    DROID: ("wrist_image_left", "exterior_image_1_left"),
    G1: ("ego_view",),
}


@pytest.fixture(scope="module")
def io() -> dict[str, NDArray]:
    return load_file(GROUPED / "io.safetensors")


def made(folder: Path, tag: str, io: dict[str, NDArray]) -> Path:
    """A checkpoint as LeRobot saves it: the recorded weights, and the processors of `tag`."""
    shutil.copytree(GROOT, folder)
    for old in folder.glob("policy_*"):
        old.unlink()
    for new in (GROUPED / tag).iterdir():
        shutil.copy(new, folder)
    values = json.loads((folder / "config.json").read_text())
    image = {"type": "VISUAL", "shape": [3, 32, 32]}
    state, action = (io[f"{tag}.{name}"].shape[-1] for name in ("state", "decoded"))
    values["input_features"] = {f"observation.images.{name}": image for name in CAMERAS[tag]} | {
        "observation.state": {"type": "STATE", "shape": [state]}
    }
    values["output_features"] = {"action": {"type": "ACTION", "shape": [action]}}
    values["use_relative_actions"] = tag != LIBERO
    values |= {"embodiment_tag": tag, "action_decode_transform": "libero" if tag == LIBERO else None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def codec_of(folder: Path) -> Codec:
    codec = checkpoints.load(folder, tokenizer=GROOT / "char_tokenizer").codec
    assert codec is not None
    return codec


@pytest.mark.parametrize("tag", [LIBERO, DROID, G1])
def test_states_actions_and_answers_are_those_that_lerobot_recorded(
    tag: str, io: dict[str, NDArray], tmp_path: Path
) -> None:
    folder = made(tmp_path / "checkpoint", tag, io)
    loaded = checkpoints.load(folder, tokenizer=GROOT / "char_tokenizer")
    codec = loaded.codec
    assert codec is not None and loaded.policy.config.embodiment_rows == (ROWS[tag],)
    assert codec.config.cameras == CAMERAS[tag] and codec.config.answered == STEPS[tag]
    declared = checkpoints.declaration(folder)
    assert (declared.relative or ()) == codec.config.relative
    for row in range(3):
        observation = seen(codec, io[f"{tag}.state"][row])
        assert_near(codec.encode(observation).state, io[f"{tag}.normal_state"][row])
        assert_near(codec.decode(io[f"{tag}.answer"][row], observation).actions, io[f"{tag}.decoded"][row])
        if f"{tag}.chunk" not in io:
            continue
        actions = np.zeros((8, codec.embodiment.action.shape[0]), np.float32)
        actions[: STEPS[tag]] = io[f"{tag}.chunk"][row]
        encoded = codec.encode(Sample(observation, actions, np.ones(8, bool), ("set", "e", 0)))
        assert encoded.actions is not None and encoded.action_mask is not None
        own = slice(6) if tag == LIBERO else slice(None)  # LeRobot learns the gripper as the files have it
        assert_near(encoded.actions[:, own], io[f"{tag}.normal_chunk"][row][:, own])
        np.testing.assert_array_equal(encoded.action_mask, io[f"{tag}.mask"][row] > 0)


def test_libero_s_gripper_is_sent_and_learned_in_the_robot_s_units(
    io: dict[str, NDArray], tmp_path: Path
) -> None:
    folder = made(tmp_path / "checkpoint", LIBERO, io)
    for name, step in ((PRE, PACK), (POST, DECODE)):
        edit(folder / name, step, lambda c: c["raw_stats"]["action"].update(gripper=RANGE))
    codec = codec_of(folder)
    observation = seen(codec, io[f"{LIBERO}.state"][0])
    answer = np.zeros((8, 12), np.float32)
    answer[:, 6] = np.linspace(-1, 0.9, 8)
    sent = codec.decode(answer, observation).actions[:, 6]
    wanted = -np.sign(2 * ((answer[:5, 6] + 1) / 2) - 1)  # LeRobot's formula
    np.testing.assert_array_equal(sent, wanted)
    again = codec.encode_actions(codec.decode(answer, observation).actions, observation)[:, 6]
    np.testing.assert_array_equal(np.sign(again), -sent)
    assert any("gripper" in point for point in learned(codec))


RANGE = {name: [value] for name, value in {
    "min": 0.0, "max": 1.0, "mean": 0.5, "std": 0.5, "q01": 0.0, "q99": 1.0,
}.items()}  # fmt: skip


def edit(path: Path, step: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(next(one for one in content["steps"] if one["registry_name"] == step)["config"])
    path.write_text(json.dumps(content))


def both(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit(folder / PRE, PACK, change)
        edit(folder / POST, DECODE, change)

    return apply


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _flat(folder: Path) -> None:
    path = next(folder.glob("policy_preprocessor*.safetensors"))
    values = load_file(path)
    save_file(values | {"observation.state.min": values["observation.state.min"] + 1}, path)


def _lerobot_shape(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["output_features"]["action"]["shape"] = [5]
    (folder / "config.json").write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one step's statistics": (
        lambda f: edit(f / POST, DECODE, lambda c: c["raw_stats"]["action"].pop("left_arm")),
        "raw_stats is not that of",
    ),
    "flat statistics": (_flat, r"observation.state.min is another one.*normalises states by it"),
    "no actions' settings": (
        both(lambda c: c["modality_config"]["action"].update(action_configs=None)), "answers from -1 to 1",
    ),
    "relative in one step only": (
        lambda f: edit(f / POST, DECODE, lambda c: c.update(use_relative_action=False)),
        "use_relative_action is false, and LeRobot trains left_arm relative",
    ),
    "valid steps": (
        lambda f: edit(f / PRE, PACK, lambda c: c.update(valid_action_horizon=4)),
        "valid_action_horizon is 4",
    ),
    "a cut": (lambda f: edit(f / POST, DECODE, lambda c: c.update(env_action_dim=5)), "env_action_dim is 5"),
    "another gripper": (
        lambda f: edit_config(f, action_decode_transform="libero"),
        "0 dimensions of the group 'gripper'",
    ),
    "a robot of other dimensions": (_lerobot_shape, "has 6 dimensions of action, and config.json 5"),
    "no group": (
        both(lambda c: c["raw_stats"]["state"].pop("left_leg")), "no statistics of state.left_leg",
    ),
    "an unknown setting": (
        lambda f: edit(f / POST, DECODE, lambda c: c.update(smooth=True)), "smooth is True; it is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_files_that_contradict_each_other_are_named(
    case: str, io: dict[str, NDArray], tmp_path: Path
) -> None:
    damage, message = DAMAGES[case]
    folder = made(tmp_path / "checkpoint", G1, io)
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        checkpoints.load(folder, tokenizer=GROOT / "char_tokenizer")


def test_what_lerobot_s_export_does_not_write_is_refused_and_vlafit_s_keeps_it(
    io: dict[str, NDArray], tmp_path: Path
) -> None:
    loaded = checkpoints.load(made(tmp_path / "c", G1, io), tokenizer=GROOT / "char_tokenizer")
    with pytest.raises(WeightsError, match="statistics of each step"):
        write(loaded.policy, loaded.codec, "lerobot", tmp_path / "out", "here")
    checkpoints.save(loaded.policy, tmp_path / "saved", loaded.codec)
    again = checkpoints.load(tmp_path / "saved").codec
    assert again is not None and loaded.codec is not None and again.config == loaded.codec.config
