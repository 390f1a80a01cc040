"""LeRobot's GR00T: what config.json decides although the processors record something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.forms import GROOT
from tests.checkpoints.test_groot import edit, edit_step
from vlafit import checkpoints, cli
from vlafit.checkpoints.export import write
from vlafit.errors import WeightsError
from vlafit.types import Observation

TOKENIZER = GROOT / "char_tokenizer"
PRE, POST, CONFIG = "policy_preprocessor.json", "policy_postprocessor.json", "config.json"
PACK, UNPACK = "groot_n1_7_pack_inputs_v1", "groot_action_unpack_unnormalize_v2"
GRIPPER = {"min": 0.0, "max": 1.0, "mean": 0.5, "std": 0.5, "q01": 0.0, "q99": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a seventh action dimension, the gripper, that was learned from 0 to 1."""
    made = Path(shutil.copytree(GROOT, tmp_path / "groot"))
    values = json.loads((made / CONFIG).read_text())
    values["output_features"]["action"]["shape"] = [7]
    edit(made / CONFIG, **values)
    edit_step(made / POST, UNPACK, env_action_dim=7)
    for path in made.glob("policy_*.safetensors"):
        arrays = load_file(path)
        for name in [name for name in arrays if name.startswith("action.")]:
            arrays[name] = np.append(arrays[name], np.float32(GRIPPER[name.removeprefix("action.")]))
        save_file(arrays, path)
    return made


def set_gripper(folder: Path, stated: object, saved: bool, tag: str = "new_embodiment") -> None:
    edit(folder / CONFIG, action_decode_transform=stated, embodiment_tag=tag)
    edit_step(folder / POST, UNPACK, libero_gripper_action=saved)


ANSWER = np.zeros((8, 12), np.float32)
ANSWER[:, 6] = np.linspace(-0.9, 0.9, 8)
LEARNED = (ANSWER[:, 6] + 1) / 2
TURNED = -np.sign(2 * LEARNED - 1)  # LeRobot's formula


def observation() -> Observation:
    frames = {name: np.zeros((36, 48, 3), np.uint8) for name in ("front", "wrist")}
    return Observation(frames, np.zeros(7, np.float32), "pick it up")


@pytest.mark.parametrize(
    ("stated", "saved", "tag", "wanted", "noted"),
    [
        ("libero", False, "new_embodiment", TURNED, True),
        ("LIBERO", True, "new_embodiment", TURNED, False),
        ("auto", True, "libero_sim", TURNED, False),
        ("none", True, "libero_sim", LEARNED, True),
        (None, True, "new_embodiment", LEARNED, True),
        (None, False, "new_embodiment", LEARNED, False),
    ],
)
def test_config_json_decides_about_libero_s_gripper_as_in_lerobot(
    stated: object, saved: bool, tag: str, wanted: np.ndarray, noted: bool, folder: Path
) -> None:
    set_gripper(folder, stated, saved, tag)
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.codec is not None
    sent = loaded.codec.decode(ANSWER, observation()).actions[:, 6]
    np.testing.assert_allclose(sent, wanted, rtol=0, atol=4 * np.finfo(np.float32).eps)
    notes = [note for note in loaded.report.notes if "action_decode_transform" in note]
    assert len(notes) == noted
    assert all(part in note for note in notes for part in (CONFIG, POST, repr(saved), repr(stated)))


def test_libero_s_gripper_is_learned_from_the_robot_s_units_and_exported_again(
    folder: Path, tmp_path: Path
) -> None:
    set_gripper(folder, "libero", True)
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.codec is not None
    actions = loaded.codec.decode(ANSWER, observation()).actions
    again = loaded.codec.encode_actions(actions, observation())[:, 6]
    np.testing.assert_array_equal(again, np.sign(ANSWER[:, 6]))
    write(loaded.policy, loaded.codec, "lerobot", tmp_path / "out", "here")
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    undo = json.loads((tmp_path / "out" / POST).read_text())["steps"][0]["config"]
    assert values["action_decode_transform"] == "libero" and undo["libero_gripper_action"] is True
    back = checkpoints.load(tmp_path / "out").codec
    assert back is not None and back.config == loaded.codec.config
    np.testing.assert_array_equal(back.decode(ANSWER, observation()).actions, actions)


def test_another_transform_is_refused(folder: Path) -> None:
    edit(folder / CONFIG, action_decode_transform="calvin")
    with pytest.raises(
        WeightsError, match=r"config.json: action_decode_transform is 'calvin'; LeRobot knows"
    ):
        checkpoints.load(folder, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embodiment_tag": "libero_sim"}, ("'libero_sim'", "'new_embodiment'", PRE, "row 10")),
        ({"n_obs_steps": 2}, ("n_obs_steps is 2", "does not read it")),
        ({"image_size": [96, 96]}, ("image_size is [96, 96]", "32 pixels", "image_target_size")),
    ],
)
def test_values_of_config_json_that_lerobot_does_not_use_are_noted(
    changes: dict[str, object], words: tuple[str, ...], folder: Path
) -> None:
    assert not checkpoints.load(folder, tokenizer=TOKENIZER).report.notes
    edit(folder / CONFIG, **changes)
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.policy.config.embodiment_rows == (10,)
    assert any(all(word in note for word in (CONFIG, *words)) for note in loaded.report.notes)


def test_without_processors_the_tokenizer_tells_the_chat_turn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.glob("policy_*"):
        path.unlink()
    for config in ([], ["--config", "chat.pad=3"]):
        assert cli.main(["inspect", str(folder), *config]) != 0
        said = capsys.readouterr().err
        assert "--tokenizer FOLDER" in said and "surplus" not in said
    assert cli.main(["inspect", str(folder), "--tokenizer", str(TOKENIZER)]) == 0
    assert "no codec" in capsys.readouterr().out
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER)
    assert loaded.policy.config.chat == checkpoints.load(GROOT, tokenizer=TOKENIZER).policy.config.chat
    with pytest.raises(WeightsError, match="assets would have no effect"):
        checkpoints.load(folder, tokenizer=TOKENIZER, assets="mine")


@pytest.mark.parametrize("file", [PRE, POST])
def test_a_statistics_file_that_is_gone_is_called_missing(file: str, folder: Path) -> None:
    gone = next(folder.glob(f"{file.removesuffix('.json')}*.safetensors"))
    gone.unlink()
    with pytest.raises(WeightsError, match=rf"{gone.name}: is missing"):
        checkpoints.load(folder, tokenizer=TOKENIZER)
