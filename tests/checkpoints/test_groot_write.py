"""NVIDIA's folder of GR00T N1.7, written: what came from it is it again, and what is new reads as it was."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.test_groot_processors import (
    DROID,
    FILES,
    G1,
    LIBERO,
    ROWS,
    TOKENIZER,
    seen,
)
from tests.checkpoints.test_groot_processors import folder as folder  # a fixture
from vlafit import checkpoints
from vlafit.checkpoints.export import export, write
from vlafit.codec import Codec, CodecConfig
from vlafit.codec.images import Framing
from vlafit.codec.normaliser import Normalisation
from vlafit.errors import VlafitError, WeightsError
from vlafit.types import Embodiment, Feature, Observation

NAMES = ("processor_config.json", "statistics.json", "embodiment_id.json")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Mapping[str, checkpoints.Loaded]:
    return {tag: checkpoints.load(folder, tokenizer=TOKENIZER, assets=tag) for tag in (LIBERO, DROID, G1)}


def content(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("tag", [LIBERO, DROID, G1])
@pytest.mark.parametrize("through", ["at once", "vlafit's own"])
def test_nvidias_folder_comes_back_as_it_was(
    tag: str, through: str, folder: Path, loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    policy, codec = loaded[tag].policy, loaded[tag].codec
    out = tmp_path / "out"
    if through == "at once":
        write(policy, codec, "groot", out, "here")
    else:
        checkpoints.save(policy, tmp_path / "saved", codec)
        export(tmp_path / "saved", "groot", out)
    for name in NAMES:
        assert content(out, name) == content(folder, name), name
    mine, theirs = (load_file(path / "model.safetensors") for path in (out, folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    here, there = (content(path, "config.json") for path in (out, folder))
    different = {key for key in here.keys() & there.keys() if here[key] != there[key]}
    assert different == {"model_name", "image_crop_size"}  # the fixture's crop is not that of its size
    again = checkpoints.load(out, assets=tag)  # its tokenizer lies in the folder
    assert again.policy.config == policy.config and again.codec is not None and codec is not None
    assert again.codec.config == codec.config and again.codec.embodiment == codec.embodiment
    assert not (out / "codec.json").exists()


def test_a_new_row_of_a_known_robot_is_an_embodiment_of_its_own(
    folder: Path, loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    new = checkpoints.load(
        folder, {"embodiment_rows": [11]}, tokenizer=TOKENIZER, assets=G1, fresh=["embodiment:11"]
    )
    made = write(new.policy, new.codec, "groot", tmp_path / "out", "here")
    assert "new_embodiment" in " ".join(made.notes) and "row 11" in " ".join(made.notes)
    assert content(tmp_path / "out", NAMES[2])["new_embodiment"] == 11
    assert content(tmp_path / "out", NAMES[2])[G1] == ROWS[G1]
    again = checkpoints.load(tmp_path / "out", assets="new_embodiment")
    assert again.policy.config.embodiment_rows == (11,)
    assert again.codec is not None and new.codec is not None
    assert again.codec.config == new.codec.config
    rng = np.random.default_rng(0)
    observation = seen(new.codec, rng.normal(size=9).astype(np.float32))
    chunk = rng.uniform(-1, 1, (8, 12)).astype(np.float32)
    one, two = (codec.decode(chunk, observation).actions for codec in (new.codec, again.codec))
    assert np.array_equal(one, two)


def fitted(policy: Any, normalisation: Normalisation = "groot_min_max", **changes: Any) -> Codec:
    """A codec as training fits it to a robot of its own, from NVIDIA's folder on."""
    needs, rng = policy.needs(), np.random.default_rng(3)
    robot = Embodiment(
        "arm",
        (Feature("top", (48, 64, 3)), Feature("wrist", (32, 32, 3))),
        Feature("state", (4,), "", ("joint.0", "joint.1", "joint.2", "gripper")),
        Feature("action", (3,)),
        10.0,
        "joint_position",
    )
    config = CodecConfig(
        ("wrist", "top"), needs.image_size, needs.state_dim, needs.action_dim, needs.chunk,
        normalisation=normalisation, prompt="groot", max_tokens=needs.max_tokens, framing="nvidia",
    )  # fmt: skip
    words = checkpoints.load(FILES.parent / "lerobot_groot", tokenizer=TOKENIZER).codec
    assert words is not None
    states, actions = rng.normal(2.0, 3.0, (90, 4)), rng.normal(size=(90, 3))
    actions[:, 1] = 0.5  # never moves
    return Codec.fit(replace(config, **changes), robot, states, actions, words.tokenizer)


OWN: Mapping[str, dict[str, Any]] = {
    "the range": {},
    "quantiles": {"normalisation": "groot_quantile"},
    "areas in a letter box": {"framing": "nvidia_area", "crop": 0.95, "letter_box": True},
    "another crop": {"crop": 0.75, "letter_box": True},
}


@pytest.mark.parametrize("case", OWN)
def test_a_robot_of_its_own_reads_as_it_was_written(
    case: str, loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    policy = loaded[LIBERO].policy
    codec = fitted(policy, **OWN[case])
    made = write(policy, codec, "groot", tmp_path / "out", "here")
    assert any(
        "joint of 3, gripper of 1; action: action of 3" in note and "row 2" in note for note in made.notes
    )
    again = checkpoints.load(tmp_path / "out").codec  # the only embodiment, and its tokenizer beside
    assert again is not None and again.config.cameras == ("wrist", "top")
    again = again.with_changes(embodiment=codec.embodiment)  # the files do not tell the sizes of frames
    assert checkpoints.load(tmp_path / "out").policy.config.embodiment_rows == (2,)
    rng = np.random.default_rng(5)
    for _ in range(4):
        frames = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in codec.embodiment.cameras}
        view = Observation(frames, rng.normal(2, 4, 4).astype(np.float32), "Pick up the red block!")
        one, two = codec.encode(view), again.encode(view)
        for name in ("images", "image_mask", "state", "tokens", "token_mask"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name
        answer = rng.uniform(-1.3, 1.3, (8, 12)).astype(np.float32)
        actions = codec.decode(answer, view).actions
        assert np.array_equal(actions, again.decode(answer, view).actions)
        both = [each.encode_actions(actions + 0.1, view) for each in (codec, again)]
        assert np.array_equal(*both)


@pytest.mark.parametrize("framing", ["groot", "nvidia_area"])
def test_lerobot_s_processors_say_how_frames_are_cut(
    framing: Framing, loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    codec = fitted(loaded[LIBERO].policy, framing=framing, crop=0.95, letter_box=True)
    write(loaded[LIBERO].policy, codec, "lerobot", tmp_path / "out", "here")
    again = checkpoints.load(tmp_path / "out").codec
    assert again is not None
    one, two = again.config, codec.config
    assert (one.framing, one.crop, one.letter_box) == (two.framing, two.crop, two.letter_box)


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "frames": ({"framing": "groot"}, r"resizes frames bilinearly.*export it to lerobot"),
    "a camera that is missing": ({"cameras": ("top", "wrist", "")}, "one of its 3 cameras is always missing"),
    "relative": ({"relative": (True, False, False)}, "statistics of absolute actions"),
    "z-scores": ({"normalisation": "mean_std"}, r"normalises by mean_std.*groot_min_max"),
    "two ways": ({"action_normalisation": "groot_quantile"}, "groot_min_max, groot_quantile"),
    "prompt": ({"prompt": "line"}, "'line'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nvidias_program_does_otherwise_is_refused_with_the_reason(
    case: str, loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    policy = loaded[LIBERO].policy
    with pytest.raises(WeightsError, match=message):
        write(policy, fitted(policy, **changes), "groot", tmp_path / "out", "here")
    assert not (tmp_path / "out").exists()


def test_a_nearly_constant_dimension_and_unattended_padding_are_refused(
    loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    policy, codec = loaded[LIBERO].policy, fitted(loaded[LIBERO].policy)
    state = codec.statistics["state"]
    assert state.min is not None
    near = state.min.copy()
    near[2] += 1e-9
    codec = Codec(
        codec.config,
        codec.embodiment,
        codec.statistics | {"state": replace(state, max=near)},
        codec.tokenizer,
    )
    with pytest.raises(WeightsError, match="nearly constant.*state 2"):
        write(policy, codec, "groot", tmp_path / "out", "here")
    other = checkpoints.load(FILES.parent / "lerobot_groot", {"attend_padding": False}, tokenizer=TOKENIZER)
    with pytest.raises(WeightsError, match="NVIDIA's program attends to padding"):
        write(other.policy, None, "groot", tmp_path / "out", "here")


def test_statistics_that_are_not_the_folders_any_more_are_not_written_as_if_they_were(
    loaded: Mapping[str, checkpoints.Loaded], tmp_path: Path
) -> None:
    policy, codec = loaded[DROID].policy, loaded[DROID].codec
    assert codec is not None
    changed = replace(codec.statistics["state"], max=codec.statistics["state"].max + 1)
    other = Codec(
        codec.config, codec.embodiment, codec.statistics | {"state": changed}, codec.tokenizer,
        origin=codec.origin,
    )  # fmt: skip
    with pytest.raises(WeightsError, match=r"not the codec that they make any more: state statistics"):
        write(policy, other, "groot", tmp_path / "out", "here")
    checkpoints.save(policy, tmp_path / "saved", codec)
    path = tmp_path / "saved" / "codec.json"
    values = json.loads(path.read_text())
    for origin, message in (
        ([], "origin must be a table"),
        ({"groot": {"tag": 3}}, "origin.groot is not what"),
    ):
        (tmp_path / "codec.json").write_text(json.dumps(values | {"origin": origin}))
        shutil.copytree(TOKENIZER, tmp_path / "tokenizer", dirs_exist_ok=True)
        with pytest.raises(VlafitError, match=message):
            write(policy, Codec.load(tmp_path), "groot", tmp_path / "out", "here")
