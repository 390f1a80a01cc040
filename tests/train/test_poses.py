"""An arm whose card says where poses and grippers are: X-VLA learns six numbers of rotation and logits."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import vlafit
from tests.train.agreement_world import start, write_card
from tests.train.world import tiny
from vlafit import cli
from vlafit.actor import PolicyActor
from vlafit.agreement import describe_recorded, recorded_otherwise, values
from vlafit.checkpoints.export import export
from vlafit.codec.rotations import to_matrices
from vlafit.config import dump, read
from vlafit.datasets import ChunkDataset, load_card, open_dataset
from vlafit.errors import ConfigError, EmbodimentError, WeightsError
from vlafit.offline.contract import compare_values
from vlafit.recipe import AdaptRecipe, PolicyRecipe, Recipe
from vlafit.train import run
from vlafit.types import ColumnForm, EpisodeKey, Gripper, Pose

CARD = """
name = "arm"
layout = "libero"
path = "arm"

[instruction]
source = "attrs"

[robot]
name = "arm"
hz = 10.0
control = "pose"
renderer = "ray"

[robot.state]
keys = ["obs/position", "obs/quaternion", "obs/width"]
dimensions = 8
[[robot.state.poses]]
position = 0
rotation = 3
form = "quaternion_xyzw"
learned = "{learned}"

[robot.action]
keys = ["actions"]
dimensions = 7
[[robot.action.poses]]
position = 0
rotation = 3
form = "axis_angle"
learned = "{learned}"
relative = {relative}
[[robot.action.grippers]]
dimension = 6
zero = -1.0
one = 1.0

[[robot.cameras]]
name = "front"
key = "obs/front"
height = 16
width = 16
"""


def write_arm(folder: Path, learned: str = "rot6d_columns", relative: str = "false") -> Path:
    rng = np.random.default_rng(0)
    (folder / "arm").mkdir(parents=True)
    with h5py.File(folder / "arm" / "reach_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "reach out"})
        for number in range(4):
            group, steps = data.create_group(f"demo_{number}"), 7
            turn = rng.normal(size=(steps, 4))
            group["obs/position"] = rng.uniform(-1, 1, (steps, 3))
            group["obs/quaternion"] = turn / np.linalg.norm(turn, axis=1, keepdims=True)
            group["obs/width"] = rng.uniform(0, 0.08, (steps, 1))
            actions = rng.uniform(-0.8, 0.8, (steps, 7))
            actions[:, 6] = np.sign(actions[:, 6])
            group["actions"] = actions
            group["obs/front"] = rng.integers(0, 256, (steps, 16, 16, 3), dtype=np.uint8)
    path = folder / "arm.toml"
    path.write_text(CARD.format(learned=learned, relative=relative))
    return path


def xvla(card: Path, **more: object) -> Recipe:
    sizes = {"state_dim": 20, "action_dim": 20, "views": 1, "action_space": "ee6d"}
    policy = PolicyRecipe(family="xvla", size="xvla-tiny", config=sizes)
    data = {"normalisation": "identity", "validation": 0.25}
    recipe = tiny(card, data=data, train={"steps": 1, "draws": 1, "validate_every": 0, "save_every": 0})
    return replace(recipe, policy=policy, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("arm")
    card = write_arm(folder)
    recipe = folder / "ee6d.toml"
    recipe.write_text(dump(xvla(card)))
    run(read(Recipe, recipe, "recipe"), folder / "run")
    return card, folder / "run" / "checkpoints" / "step_000001"


def test_x_vla_learns_ee6d_from_a_card_and_answers_in_the_robot_s_units(trained: tuple[Path, Path]) -> None:
    card, folder = trained
    loaded = vlafit.load_checkpoint(folder)
    codec, store = loaded.codec, open_dataset(load_card(card))
    assert codec is not None and codec.statistics["action"].dimensions == 10
    sample = ChunkDataset([store], codec.config.chunk, [[store.episodes[0].id]])[2]
    encoded = codec.encode(sample)
    assert encoded.actions is not None and encoded.action_mask is not None
    assert encoded.action_mask[:, :10].any() and not encoded.action_mask[:, 10:].any()
    turned = to_matrices(sample.actions[:, 3:6], "axis_angle")
    learned = to_matrices(encoded.actions[:, 3:9], "rot6d_columns")
    np.testing.assert_allclose(learned, turned, atol=10 * np.finfo(np.float32).eps)
    assert set(np.unique(encoded.actions[:, 9])) <= {0.0, 1.0}
    assert cli.main(["eval", str(folder), "--data", str(card), "--out", str(card.parent / "eval")]) == 0
    actor = PolicyActor(loaded.policy, codec)
    chunk = actor.act([sample.observation], [EpisodeKey(0, "reach", 0)])[0]
    assert chunk.actions.shape == (codec.config.chunk, 7)
    assert set(np.unique(chunk.actions[:, 6])) <= {-1.0, 1.0}


def test_inspect_says_it_and_other_programs_refuse_it(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, folder = trained
    assert cli.main(["inspect", str(folder), "--data", str(card)]) == 0
    said = capsys.readouterr().out
    assert "learned  state: rotation 3 to 6 (quaternion_xyzw) as rot6d_columns; 10 dimensions" in said
    assert "gripper 6 (-1 is 0, 1 is 1)" in said
    with pytest.raises(WeightsError, match=r"lerobot does not repeat .*rotation 3 to 5 \(axis_angle\)"):
        export(folder, "lerobot", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(folder, "vlafit", tmp_path / "own")
    again, before = (vlafit.load_checkpoint(one).codec for one in (tmp_path / "own", folder))
    assert again is not None and before is not None and again.config == before.config


def test_agreement_shows_both_forms_and_refuses_two(trained: tuple[Path, Path], tmp_path: Path) -> None:
    card, folder = trained
    same = replace(xvla(card), policy=PolicyRecipe(checkpoint=str(folder)))
    items = {one.name: one for one in start(same).agreement.items}
    assert items["learned of actions"].status == "same"
    other = write_arm(tmp_path, learned="rot6d_rows", relative="true")
    recipe = replace(same, data=replace(same.data, cards=(str(other),)))
    with pytest.raises(EmbodimentError) as raised:
        start(recipe)
    for name in ("learned of the state", "learned of actions"):
        assert name in str(raised.value)
    text = str(raised.value)
    assert "as rot6d_columns" in text and "in the frame of the state's pose 0" in text
    fresh = replace(recipe.data, statistics="data")
    begun = start(replace(recipe, data=fresh, adapt=AdaptRecipe(actions="data")))
    form = next(iter(begun.codecs)).config.action_form
    assert form.poses[0].relative and form.poses[0].policy_form == "rot6d_rows"
    kept = start(replace(recipe, adapt=AdaptRecipe(actions="checkpoint")))
    assert next(iter(kept.codecs)).config.action_form.poses[0].policy_form == "rot6d_columns"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('3\nform = "axis_angle"', '5\nform = "axis_angle"', r"arm\.toml: robot\.action: .*5 to 7"),
        ("zero = -1.0", "zero = 1.0", "gripper 0: zero and one must be two different numbers"),
        ('form = "axis_angle"', 'form = "axis-angle"', "axis_angle"),
        ('control = "pose"', 'control = "delta_pose"', "differences already"),
    ],
)  # fmt: skip
def test_a_card_that_is_wrong_names_the_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    card = write_arm(tmp_path, relative="true")
    card.write_text(card.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_card(card)


def test_a_dataset_whose_card_records_rotations_otherwise_is_not_evaluated(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """It says wxyz of the same columns; what is learned of them may differ."""
    card, folder = trained
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None
    other = write_arm(tmp_path / "same", learned="rot6d_rows")
    compare_values(codec, open_dataset(load_card(other)), "the checkpoint", ("state.0", "state.1", "state.2"))
    text = card.read_text().replace("quaternion_xyzw", "quaternion_wxyz")
    (card.parent / "wxyz.toml").write_text(text)
    with pytest.raises(EmbodimentError, match=r"robot.state is recorded as .*wxyz.* learned from .*xyzw"):
        compare_values(codec, open_dataset(load_card(card.parent / "wxyz.toml")), "the checkpoint")


def test_the_difference_is_named_where_rotations_are_learned_as_they_are_recorded() -> None:
    xyzw = ColumnForm((Pose(0, 3, "quaternion_xyzw"),), (Gripper(7, 0.0, 1.0),))
    wxyz = ColumnForm((Pose(0, 3, "quaternion_wxyz"),), (Gripper(7, 0.0, 1.0),))
    assert recorded_otherwise(xyzw, wxyz) and not recorded_otherwise(xyzw, ColumnForm())
    assert describe_recorded(xyzw) == (
        "rotation 3 to 6 as quaternion_xyzw, position 0 to 2; gripper 7 (0 is 0, 1 is 1)"
    )


@pytest.mark.case(
    section="data",
    report="X-VLA learns nothing from my joints, and nobody said why",
    user_has="six joints without poses, and an X-VLA whose loss takes actions for positions and rotations",
    now='refused with what the policy takes and `action_space = "auto"`; stated in the agreement otherwise',
)
def test_joints_are_not_learned_as_positions_and_rotations(tmp_path: Path) -> None:
    joints = write_card(tmp_path / "data")
    expected = r"action space: dataset: 2 dimensions.*'ee6d'.*\n.*10 or 20"
    with pytest.raises(EmbodimentError, match=expected) as error:
        run(xvla(joints), tmp_path / "run")
    assert 'policy.config.action_space = "auto"' in str(error.value)


def test_what_an_action_space_takes_is_in_the_agreement(trained: tuple[Path, Path]) -> None:
    items = {item.name: item for item in values.read(trained[1]).items}  # type: ignore[union-attr]
    assert items["action space"].status == "same" and "two columns" in items["action space"].value
