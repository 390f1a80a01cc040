"""A card is drafted from any HDF5 files that a card can describe; what they do not tell is marked."""

import glob
import io
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.datasets import hdf5_writers, lerobot_files
from tests.datasets.hdf5_writers import aloha, aloha_encoded, maniskill, robocasa
from tests.datasets.layouts import demos, in_file_order, write_robomimic
from vlafit.cli import main
from vlafit.datasets import Draft, describe, open_dataset, open_draft
from vlafit.datasets.layouts import generic
from vlafit.datasets.write import card_text
from vlafit.errors import DataError

RNG = np.random.default_rng(0)
T = 9
FRAMES = RNG.integers(0, 256, (T, 16, 12, 3), dtype=np.uint8)
ENCODERS = RNG.integers(0, 4000, (T, 6)).astype(np.int32)
COMMANDS = RNG.normal(size=(T, 7))


def write(path: Path, groups: dict[str, dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for group, datasets in groups.items():
            for key, values in datasets.items():
                where = file.require_group(group)
                if key.startswith("@"):
                    where.attrs[key[1:]] = values
                else:
                    where[key] = values
    return path


def jpegs(rows: np.ndarray) -> np.ndarray:
    made = []
    for frame in rows:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG")
        made.append(buffer.getvalue())
    widest = max(map(len, made))
    return np.stack([np.frombuffer(row.ljust(widest, b"\0"), np.uint8) for row in made])


RUN = {
    "vision/left": FRAMES,
    "encoders": ENCODERS,
    "wanted": COMMANDS,
    "speeds": COMMANDS,
    "t": np.arange(T) / 30,
}


@pytest.mark.case(
    section="data",
    report="my HDF5 files are of no layout that vlafit knows",
    user_has="a recorder of one's own: other names, counts of encoders, groups of sessions",
    now="a card with every guess marked, and what to choose from where the files tell nothing",
)
def test_a_recorder_of_ones_own_is_drafted_with_what_there_is_to_choose_from(tmp_path: Path):
    about = {"@about": json.dumps({"sentence": "put it down", "operator": "x"})}
    path = write(tmp_path / "log.h5", {f"session_1/run_{n}": RUN | about for n in range(3)})
    draft = describe(path)
    robot = draft.card.robot
    assert draft.card.options(generic.Section).demonstrations == "session_*/run_*"
    assert (robot.hz, robot.cameras[0].key, robot.state.keys) == (30.0, "vision/left", ("encoders",))
    assert (draft.card.instruction.source, draft.card.instruction.key) == ("demo", "about.sentence")
    assert "'put it down'" in draft.guesses["instruction.key"]
    assert {*draft.missing} == {
        "robot.state.scale",
        "robot.action.keys",
        "robot.action.dimensions",
        "robot.control",
    }
    assert "encoders int32 [9, 6], speeds float64 [9, 7], t float64 [9]" in draft.missing["robot.action.keys"]
    assert {"rows.action_shift", "robot.cameras.0.channels"} <= {*draft.guesses}
    text = card_text(draft.card, draft.guesses, draft.missing)
    for old, new in (
        ("keys = []", 'keys = ["wanted[:, :6]"]'),
        ("dimensions = 0", "dimensions = 6"),
        ("scale = []", f"scale = {[0.5] * 6}"),
        ('control = ""', 'control = "joint_position"'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "card.toml").write_text(text)
    store = open_dataset(tmp_path / "card.toml")
    sample = store.sample(2, 3, 4)
    np.testing.assert_array_equal(sample.observation.state, (ENCODERS[3] * 0.5).astype(np.float32))
    np.testing.assert_array_equal(sample.actions, COMMANDS[3:7, :6].astype(np.float32))
    np.testing.assert_array_equal(sample.observation.images["left"], FRAMES[3])
    assert sample.observation.instruction == "put it down" and len(store.episodes) == 3
    with pytest.raises(DataError, match=r"before a card names.*\n  robot\.action\.keys"):
        open_draft(draft)


GROUPS: dict[str, tuple[list[str], str]] = {
    "the whole file": (["/"], "/"),
    "one group": (["recording"], "recording"),
    "one numbered group": (["take_3"], "take_*"),
    "numbered groups": (["take_3", "take_10"], "take_*"),
    "named groups": (["alpha", "beta"], "*"),
    "two levels": (["a/run1", "b/run1", "b/run2"], "*/run*"),
    "three levels": (["x/data/e0", "x/data/e1"], "x/data/e*"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_are_demonstrations_are_found(name: str, tmp_path: Path):
    groups, pattern = GROUPS[name]
    datasets = {
        "obs/images/top/rgb": FRAMES,
        "obs/images/side/rgb": FRAMES,
        "obs/state": COMMANDS,
        "command": COMMANDS,
    }
    others = {"statistics": {"mean": np.zeros(7)}, "cameras/top": {"matrix": np.eye(3)}}
    path = write(tmp_path / "log.h5", dict.fromkeys(groups, datasets) | others)
    draft = describe(path)
    assert draft.card.options(generic.Section).demonstrations == pattern
    assert [camera.name for camera in draft.card.robot.cameras] == ["side", "top"]
    assert (draft.card.robot.state.keys, draft.card.robot.action.keys) == (("obs/state",), ("command",))
    assert len(open_draft(draft).episodes) == len(groups)


PLAIN = {"state": COMMANDS, "action": COMMANDS, "cam": FRAMES}


def changed(path: Path, change: Callable[[h5py.File], object]) -> Path:
    with h5py.File(path, "a") as file:
        change(file)
    return path


def linked(file: h5py.File) -> None:
    """A camera in another file, links that lead nowhere, and groups that hold themselves."""
    with h5py.File(Path(file.filename).with_name("frames.part"), "w") as other:
        other["x"] = FRAMES
    del file["cam"]
    file["cam"] = h5py.ExternalLink("frames.part", "x")
    file["nowhere"] = h5py.SoftLink("/nothing")
    file["away"] = h5py.ExternalLink("nothing.h5", "/x")
    file["group/self"] = file["/"]
    file["again"] = h5py.SoftLink("/")


def test_links_are_followed_and_those_that_lead_nowhere_or_round_are_not(tmp_path: Path):
    path = changed(write(tmp_path / "a.h5", {"/": PLAIN}), linked)
    draft = describe(path)
    assert draft.card.options(generic.Section).demonstrations == "/"
    assert [camera.key for camera in draft.card.robot.cameras] == ["cam"]
    np.testing.assert_array_equal(open_draft(draft).image(0, 3, "cam"), FRAMES[3])


def test_a_file_of_links_to_the_files_of_episodes_is_drafted(tmp_path: Path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for number in range(3):
            write(tmp_path / f"part{number}.part", {"/": PLAIN})
            file[f"ep_{number}"] = h5py.ExternalLink(f"part{number}.part", "/")
    draft = describe(tmp_path / "all.h5")
    assert draft.card.options(generic.Section).demonstrations == "ep_*"
    assert len(open_draft(draft).episodes) == 3


def test_names_of_groups_may_hold_signs_of_patterns_and_there_may_be_many(tmp_path: Path):
    path = write(tmp_path / "a.h5", dict.fromkeys([f"x[1]/run{n}" for n in range(120)], PLAIN))
    draft = describe(path)
    assert draft.card.options(generic.Section).demonstrations == "x[[]1]/run*"
    assert "such as x[1]/run0, x[1]/run1, x[1]/run2" in draft.guesses["generic.demonstrations"]
    assert len(open_draft(draft).episodes) == 120


def test_what_a_file_is_called_writes_no_line_of_the_card(tmp_path: Path):
    """A name with a line break would be a key of the card: of a layout, say, whose module is imported."""
    name = 'x"\nlayout = "os.path"\n#\x1b[31m'
    draft = describe(write(tmp_path / "a.h5", {name: PLAIN | {"other": COMMANDS}}))
    text = card_text(draft.card, draft.guesses, draft.missing)
    (tmp_path / "card.toml").write_text(text)
    assert tomllib.loads(text)["layout"] == "generic" and "\x1b" not in text
    assert tomllib.loads(text)["generic"]["demonstrations"] == glob.escape(name)


def test_only_whole_numbers_and_one_action_fewer_are_drafted(tmp_path: Path):
    pwm = RNG.integers(0, 255, (T - 1, 5), dtype=np.uint8)  # no rows of pictures
    datasets = {"cam": jpegs(FRAMES), "ticks": ENCODERS, "cmd": pwm, "stamp": np.arange(T) * 10**9}
    draft = describe(write(tmp_path / "set" / "a.hdf5", {"/": datasets}))
    robot = draft.card.robot
    assert (robot.state.keys, robot.action.keys, draft.card.rows.observations) == (
        ("ticks",),
        ("cmd",),
        "T+1",
    )
    assert "what is left" in draft.guesses["robot.state.keys"]
    assert {"robot.state.scale", "robot.action.scale", "robot.cameras.0.channels"} <= {*draft.missing}
    store = open_draft(draft)
    np.testing.assert_array_equal(store.actions(0), pwm.astype(np.float32))
    assert store.episodes[0].length == T - 1


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        (
            {"image": FRAMES.transpose(0, 3, 1, 2)},
            r"may be.*image uint8 \[9, 3, 16, 12\]; a row for each step, channels last",
        ),
        ({"image": FRAMES[..., 0]}, r"may be frames.*image uint8 \[9, 16, 12\]"),
        ({"image": FRAMES / np.float32(255)}, r"may be frames.*image float32 \[9, 16, 12, 3\]"),
        ({}, r"holds no frames.*It holds action float64 \[9, 7\], state float64 \[9, 7\]"),
    ],
)
def test_frames_in_a_form_that_is_not_read_are_named(datasets: dict[str, object], says: str, tmp_path: Path):
    path = write(tmp_path / "a.h5", {"/": datasets | {"state": COMMANDS, "action": COMMANDS}})
    with pytest.raises(DataError, match=says):
        describe(path)


def test_columns_that_no_card_can_take_are_named(tmp_path: Path):
    table = np.zeros(T, dtype=[("q", "f4", (6,)), ("a", "f4", (6,))])
    with pytest.raises(DataError, match=r"no columns of numbers.*log a table of fields \[9\]"):
        describe(write(tmp_path / "a.h5", {"/": {"log": table, "image": FRAMES}}))


# ----------------------------------------------------------------------------- what known layouts leave open

EVERYTHING = in_file_order(demos(2))
OPEN: dict[str, tuple[Callable[..., object], set[str], set[str]]] = {
    "aloha": (
        aloha,
        {"rows.action_shift", "robot.cameras.0.channels", "robot.hz", "robot.control"},
        {"instruction.text"},
    ),
    "aloha with JPEG": (aloha_encoded, {"rows.action_shift"}, {"robot.cameras.0.channels"}),
    "robotwin": (hdf5_writers.robotwin, {"rows.action_shift"}, {"robot.hz", "robot.cameras.1.channels"}),
    "maniskill": (maniskill, {"episodes.success", "robot.hz"}, {"instruction.text"}),
    "robocasa": (robocasa, {"robot.cameras.0.rotate", "robot.state.keys"}, set()),
    "lerobot": (lerobot_files.write, {"robot.control"}, set()),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_the_files_of_a_layout_do_not_tell_is_marked(name: str, tmp_path: Path):
    make, guesses, missing = OPEN[name]
    make(tmp_path / "set", EVERYTHING)
    draft = describe(tmp_path / "set")
    assert guesses <= {*draft.guesses} and missing <= {*draft.missing}
    text = card_text(draft.card, draft.guesses, draft.missing)  # every mark has its line
    assert text.count("# GUESS: ") + text.count("# FILL IN: ") == len(draft.guesses) + len(draft.missing)


@pytest.mark.parametrize(
    ("copy", "shift", "says"), [(0, 1, "of its own row"), (1, 0, "of the next row already")]
)
def test_actions_that_are_copies_of_states_are_noticed(copy: int, shift: int, says: str, tmp_path: Path):
    states = np.cumsum(RNG.normal(size=(T, 14)), axis=0)
    actions = np.concatenate([states[copy:], states[T - copy :]])
    datasets = {"observations/qpos": states, "action": actions, "observations/images/top": FRAMES}
    draft = describe(write(tmp_path / "episode_0.hdf5", {"/": datasets}))
    assert draft.card.rows.action_shift == shift and says in draft.guesses["rows.action_shift"]


def test_files_that_the_path_of_the_card_leaves_out_are_named(tmp_path: Path):
    datasets = {"/": {"state": COMMANDS, "action": COMMANDS, "cam": FRAMES}}
    write(tmp_path / "set" / "a.h5", datasets)
    assert "path" not in describe(tmp_path / "set").guesses
    write(tmp_path / "set" / "more" / "b.h5", datasets)
    assert describe(tmp_path / "set").guesses["path"] == "it leaves out the files in folders below: b.h5"
    write(tmp_path / "set" / "more" / "c.hdf5", datasets)
    (tmp_path / "set" / "a.h5").unlink()
    assert describe(tmp_path / "set").guesses["path"] == "it leaves out files of another ending: c.hdf5"


ROBOMIMIC = {
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_gripper_qvel": 2,
    "robot0_joint_pos": 7,
    "object": 10,
}


def robomimic(path: Path, widths: dict[str, int]) -> Draft:
    """Draft the card of a robomimic file with these observations."""
    rows = {f"obs/{key}": RNG.normal(size=(T, width)) for key, width in widths.items()}
    rows |= {f"next_{key}": values for key, values in rows.items()}
    more = {"actions": COMMANDS, "dones": np.zeros(T), "rewards": np.zeros(T), "obs/agentview_image": FRAMES}
    return describe(write(path, {"data/demo_0": rows | more}))


def test_a_robomimic_draft_takes_the_pose_of_the_hand_and_the_gripper_and_names_the_joints(tmp_path: Path):
    draft = robomimic(tmp_path / "a.hdf5", ROBOMIMIC)
    hand = ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos")
    assert draft.card.layout == "robomimic" and draft.card.robot.state.keys == hand
    marked = draft.guesses["robot.state.keys"]
    assert "there are also" in marked and "obs/robot0_joint_pos float64" in marked
    assert not [word for word in ("dones", "rewards", "next_obs", "actions") if word in marked]
    without_hand = {k: w for k, w in ROBOMIMIC.items() if "eef" not in k}
    joints = robomimic(tmp_path / "b.hdf5", without_hand).card.robot.state
    assert joints.keys == ("obs/robot0_joint_pos", "obs/robot0_gripper_qpos") and joints.dimensions == 9


def test_filter_keys_are_named_by_the_draft_and_by_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_robomimic(tmp_path / "set", demos(6))
    assert main(["data", "card", str(folder)]) == 0
    text = capsys.readouterr().out
    assert '(4), valid (2)\nmask = ""' in text and "# GUESS: all demonstrations; a filter key" in text
    assert main(["data", "inspect", str(folder)]) == 0
    assert "filter keys: train (8), valid (4); mask in [robomimic]" in capsys.readouterr().out
    path = tmp_path / "train.toml"
    path.write_text(text.replace('text = ""', 'text = "push"').replace('mask = ""', 'mask = "train"'))
    assert main(["data", "inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["episodes"] == 8 and facts["filter_keys"] == {"train": 8, "valid": 4}
    without = robomimic(tmp_path / "a.hdf5", ROBOMIMIC)
    assert "robomimic.mask" not in without.guesses and without.card.section is None


def test_a_robomimic_draft_takes_both_arms(tmp_path: Path):
    both = ROBOMIMIC | {k.replace("robot0", "robot1"): w for k, w in ROBOMIMIC.items() if "robot0" in k}
    state = robomimic(tmp_path / "a.hdf5", both).card.robot.state
    assert state.dimensions == 18
    assert [key.split("_")[0] for key in state.keys] == ["obs/robot0"] * 3 + ["obs/robot1"] * 3


def test_ends_and_success_are_not_offered_as_a_state_and_no_alternative_is_no_choice(tmp_path: Path):
    maniskill(tmp_path / "set", EVERYTHING)
    guesses = describe(tmp_path / "set").guesses
    assert "success" not in guesses.get("robot.state.keys", "")
    rows = {"obs/joint_states": COMMANDS, "obs/gripper_states": COMMANDS[:, :2], "actions": COMMANDS}
    ends = {"dones": np.zeros(T, np.uint8), "rewards": np.zeros(T, np.uint8)}
    path = write(tmp_path / "a_demo.hdf5", {"data/demo_0": rows | ends | {"obs/agentview_rgb": FRAMES}})
    draft = describe(path)
    assert draft.card.layout == "libero" and "robot.state.keys" not in draft.guesses
    assert "none" not in " ".join(draft.guesses.values())


def test_a_state_chosen_by_its_name_is_not_the_gripper_alone(tmp_path: Path):
    rows = {"gripper_qpos": COMMANDS[:, :1], "joint_positions": COMMANDS, "action": COMMANDS, "cam": FRAMES}
    assert describe(write(tmp_path / "a.h5", {"/": rows})).card.robot.state.keys == ("joint_positions",)


# ------------------------------------------------------------------------------------- files that do not open


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.case(
    section="data",
    report="one truncated file after the other is named",
    user_has="a folder in which several downloads were cut short",
    now="each file that cannot be opened is named at once, and in the drafted card",
)
def test_every_file_that_cannot_be_opened_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = aloha(tmp_path / "set", EVERYTHING)
    files = sorted((tmp_path / "set").rglob("*.hdf5"))
    for path in (files[0], files[2]):
        cut(path)
    draft = describe(tmp_path / "set")
    reason = draft.missing["episodes.on_bad"]
    assert reason.startswith("2 of 4 files cannot be opened") and 'or leave them out by "skip"' in reason
    assert str(files[0]) in reason and str(files[2]) in reason
    assert len(open_draft(draft).left_out) == 2
    with pytest.raises(DataError, match=f"(?s){files[0]}.*{files[2]}"):
        open_dataset(made)
    assert len(open_dataset(replace(made, episodes=replace(made.episodes, on_bad="skip"))).episodes) == 2
    for path in (files[1], files[3]):
        cut(path)
    assert main(["data", "card", str(tmp_path / "set")]) == 2
    said = capsys.readouterr().err
    assert "none of its 4 HDF5 files can be opened" in said and all(str(path) in said for path in files)


def test_a_lerobot_dataset_whose_success_is_recorded_and_whose_columns_have_other_names(tmp_path: Path):
    made = lerobot_files.write(tmp_path / "set", EVERYTHING)
    info = Path(made.path) / "meta" / "info.json"
    features = json.loads(info.read_text())
    features["features"]["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    features["features"]["joints"] = features["features"].pop("observation.state")
    info.write_text(json.dumps(features))
    draft: Draft = describe(Path(made.path))
    assert '"next.success"' in draft.guesses["episodes.success"]
    assert "joints float32 [5]" in draft.missing["robot.state.keys"]
