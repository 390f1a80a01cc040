"""What a card can say about rows, columns, channels, sentences and episodes, in the layouts that share it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.datasets import hdf5_writers, lerobot_files, npz_layout
from tests.datasets.hdf5_writers import aloha, aloha_encoded, encoded, maniskill, padded, robocasa, robotwin
from tests.datasets.layouts import SIZE, TASKS, card, demos, in_file_order, write_libero
from tests.datasets.writers import WRITERS
from vlafit.datasets import Card, layouts, load_card, open_dataset
from vlafit.datasets.card import CameraCard, EpisodesCard, InstructionCard, RowsCard
from vlafit.datasets.layouts import generic
from vlafit.datasets.pictures import RGB_MARK
from vlafit.datasets.write import card_text
from vlafit.errors import ConfigError, DataError

EVERYTHING = in_file_order(demos(3))


def with_state(made: Card, *keys: str, dimensions: int = 5, **changes: object) -> Card:
    state = replace(made.robot.state, keys=keys, dimensions=dimensions, labels=(), **changes)  # type: ignore[arg-type]
    return replace(made, robot=replace(made.robot, state=state))


# ----------------------------------------------------------------------------------------- columns and rows


@pytest.mark.parametrize("write", [aloha, lerobot_files.write])
def test_dimensions_are_cut_scaled_and_turned_in_every_layout(
    write: Callable[..., Card], tmp_path: Path
) -> None:
    made = write(tmp_path / "set", EVERYTHING)
    key = made.robot.state.keys[0]
    changed = with_state(
        made, f"{key}[:, 1:3]", f"{key}[:, -1]", dimensions=3, scale=(2.0, -1.0, 1.0), offset=(0.0, 0.0, 0.5)
    )
    whole, cut = open_dataset(made), open_dataset(changed)
    for number in range(len(EVERYTHING)):
        expected = whole.state(number)[:, [1, 2, 4]] * np.array([2.0, -1, 1]) + [0, 0, 0.5]
        np.testing.assert_array_equal(cut.state(number), expected.astype(np.float32))


def test_whole_numbers_need_a_scale(tmp_path: Path) -> None:
    made = aloha(tmp_path / "set", EVERYTHING)
    for path in (tmp_path / "set").rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            ticks = np.arange(len(file["action"]) * 5).reshape(-1, 5)  # type: ignore[arg-type]
            file["ticks"] = ticks.astype(np.int16)
    with pytest.raises(DataError, match=r"ticks is int16.*robot\.state\.scale"):
        open_dataset(with_state(made, "ticks"))
    scaled = open_dataset(with_state(made, "ticks", scale=(0.5, 0.5, 0.5, 0.5, -0.5))).state(0)
    np.testing.assert_array_equal(scaled[1], np.array([2.5, 3, 3.5, 4, -4.5], np.float32))


@pytest.mark.parametrize("key", ["x[:, 1:2", "x[1]", "x[:, a]", "x[:, ::0]", "x[:]"])
def test_a_key_whose_brackets_say_nothing_is_refused(key: str, tmp_path: Path) -> None:
    made = aloha(tmp_path / "set", EVERYTHING[:1])
    if key.endswith("]"):
        with pytest.raises(ConfigError, match=r"robot\.state.*is no key"):
            open_dataset(with_state(made, key))
    else:
        with pytest.raises(DataError, match="no dataset"):
            open_dataset(with_state(made, key))


@pytest.mark.parametrize("write", [aloha, lerobot_files.write, hdf5_writers.any_hdf5])
@pytest.mark.parametrize("shift", [1, -1])
def test_the_action_of_a_step_can_be_in_another_row(
    write: Callable[..., Card], shift: int, tmp_path: Path
) -> None:
    made = write(tmp_path / "set", EVERYTHING)
    plain, shifted = open_dataset(made), open_dataset(replace(made, rows=RowsCard(action_shift=shift)))
    for number, info in enumerate(plain.episodes):
        actions, moved = plain.actions(number), shifted.actions(number)
        if shift == 1:  # the next row; the last step has none
            np.testing.assert_array_equal(moved, actions[1:])
        else:  # the row before; the first is repeated
            np.testing.assert_array_equal(moved, np.concatenate([actions[:1], actions[:-1]]))
        assert len(shifted.state(number)) == len(moved) == shifted.episodes[number].length
        last = shifted.sample(number, len(moved) - 1, 2)
        np.testing.assert_array_equal(last.observation.state, plain.state(number)[len(moved) - 1])
        with pytest.raises(DataError, match="step must be"):
            shifted.image(number, info.length - max(0, shift), "front")
    with pytest.raises(DataError, match=r"action_shift = 4 leaves no step"):
        open_dataset(replace(made, rows=RowsCard(action_shift=4)))


def test_the_next_state_can_be_the_action(tmp_path: Path) -> None:
    made = aloha(tmp_path / "set", EVERYTHING)
    action = replace(made.robot.action, keys=("observations/qpos",), dimensions=5)
    changed = replace(made, robot=replace(made.robot, action=action), rows=RowsCard(action_shift=1))
    store = open_dataset(changed)
    np.testing.assert_array_equal(store.actions(0)[:-1], store.state(0)[1:])


def test_one_row_more_of_observations_must_be_declared_and_a_contradicting_json_is_named(
    tmp_path: Path,
) -> None:
    made = maniskill(tmp_path / "set", EVERYTHING)
    with pytest.raises(DataError, match=r"traj_0.*differ in length.*rows\.observations = \"T\+1\""):
        open_dataset(replace(made, rows=RowsCard(observations="T")))
    assert [info.seed for info in open_dataset(made).episodes] == [100, 101, 102] * 2
    path = tmp_path / "set" / f"{TASKS[0]}.json"
    path.write_text(path.read_text().replace('"episode_id": 2', '"episode_id": 9'))
    with pytest.raises(DataError, match=r"JSON file lists traj_9"):
        open_dataset(made)


@pytest.mark.case(
    section="data",
    report="every action belongs to the observation of another step",
    user_has='a card that says `rows.observations = "T+1"` for files with as many observations as actions',
    now="refused with the rows of each key and the value that fits",
)
def test_rows_are_counted_against_what_the_card_declares_in_both_directions(tmp_path: Path) -> None:
    one_more = RowsCard(observations="T+1")
    made = hdf5_writers.any_hdf5(tmp_path / "same", EVERYTHING)
    assert open_dataset(replace(made, rows=RowsCard(observations="T"))).episodes
    fits = r'one row more than actions \(rows.observations \'T\+1\'\). .*rows.observations = "T"'
    with pytest.raises(DataError, match=rf"take-0: columns are of one length \(.*action/xyz 4.*{fits}"):
        open_dataset(replace(made, rows=one_more))
    with h5py.File(tmp_path / "same" / "log.h5", "a") as file:
        group = file["runs/take-0"]
        assert isinstance(group, h5py.Group)
        for key in ("action/xyz", "action/hand"):  # two actions fewer than observations
            rows = np.asarray(group[key])[:-2]
            del group[key]
            group[key] = rows
    with pytest.raises(DataError, match="take-0: columns differ in length .*Record it again, or leave"):
        open_dataset(made)


@pytest.mark.parametrize("name", ["lerobot", npz_layout.__name__])
def test_a_layout_that_counts_no_rows_refuses_the_key(name: str, tmp_path: Path) -> None:
    made = WRITERS[name](tmp_path / "set", EVERYTHING)
    with pytest.raises(ConfigError, match="knows no rows.observations; leave it out"):
        open_dataset(replace(made, rows=RowsCard(observations="T")))


@pytest.mark.parametrize("wrong", [5, None, b"set", ["metaworld-faucet"], 1.5, "x" * 5000], ids=type)
def test_what_is_no_name_of_a_dataset_is_one_sentence(wrong: object) -> None:
    with pytest.raises(ConfigError):
        open_dataset(wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- frames and channels


def test_encoded_rows_of_either_channel_order_decode_to_the_raw_frames(tmp_path: Path) -> None:
    made = aloha_encoded(tmp_path / "set", EVERYTHING)
    store = open_dataset(made)
    for number, demo in enumerate(EVERYTHING):
        np.testing.assert_array_equal(store.images(number, range(len(demo.front)), "front"), demo.front)
        np.testing.assert_array_equal(store.image(number, 1, "wrist"), demo.wrist[1])
    undeclared = tuple(replace(c, channels="") for c in made.robot.cameras)
    with pytest.raises(DataError, match="channels.*'front'"):
        open_dataset(replace(made, robot=replace(made.robot, cameras=undeclared)))


@pytest.mark.parametrize("channels", ["", "rgb", "bgr"])
def test_a_frame_that_is_marked_as_rgb_is_read_so_whatever_the_card_says(
    channels: str, tmp_path: Path
) -> None:
    made = robotwin(tmp_path / "set", EVERYTHING)
    red = np.zeros((*SIZE, 3), np.uint8)
    red[..., 0] = 250
    for path in (tmp_path / "set").rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            key = "observation/wrist_camera/rgb"
            rows = len(file[key])  # type: ignore[arg-type]
            del file[key]
            file[key] = padded([encoded(red, RGB_MARK)] * rows)
    wrist = replace(made.robot.cameras[1], channels=channels)  # type: ignore[arg-type]
    changed = replace(made, robot=replace(made.robot, cameras=(made.robot.cameras[0], wrist)))
    frame = open_dataset(changed).image(0, 0, "wrist")
    assert frame[..., 0].min() > 230 and frame[..., 2].max() < 20


def test_frames_are_turned_mirrored_and_exchanged_as_declared() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    expected = {
        (0, "", ""): frame,
        (180, "", ""): frame[:, ::-1, ::-1],
        (0, "vertical", ""): frame[:, ::-1],
        (0, "horizontal", ""): frame[:, :, ::-1],
        (180, "vertical", "bgr"): frame[:, :, ::-1, ::-1],
        (0, "", "bgr"): frame[..., ::-1],
    }
    for (rotate, flip, channels), result in expected.items():
        camera = CameraCard("c", "c", 6, 5, rotate, flip, channels)  # type: ignore[arg-type]
        made = camera.upright(frame)
        np.testing.assert_array_equal(made, result)
        assert made is frame or (made.flags.c_contiguous and not made.flags.writeable)


def test_a_card_that_turns_frames_which_the_file_calls_upright_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    open_dataset(made)
    assert caplog.text == ""
    path = tmp_path / "set" / f"{TASKS[0]}_demo.hdf5"
    with h5py.File(path, "r+") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    open_dataset(made)
    assert path.name in caplog.text and "macros_image_convention" in caplog.text and "front" in caplog.text


def test_frames_that_were_allocated_and_never_written_are_refused(tmp_path: Path) -> None:
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    with h5py.File(tmp_path / "set" / f"{TASKS[0]}_demo.hdf5", "r+") as file:
        del file["data/demo_1/obs/agentview_rgb"]
        file.create_dataset("data/demo_1/obs/agentview_rgb", (5, *SIZE, 3), np.uint8)
    with pytest.raises(DataError, match="demo_1: obs/agentview_rgb .*never written"):
        open_dataset(made)


# ------------------------------------------------------------------------------------------------- sentences


def test_a_sentence_for_each_demonstration_is_read_from_where_the_card_says(tmp_path: Path) -> None:
    made = robocasa(tmp_path / "set", EVERYTHING)
    again = replace(made, instruction=InstructionCard("demo", key="ep_meta.lang"))
    assert open_dataset(again).episodes == open_dataset(made).episodes
    with pytest.raises(DataError, match="demo_0: ep_meta: .*'language'.*lang, layout_id"):
        open_dataset(replace(made, instruction=InstructionCard("demo", key="ep_meta.language")))
    with pytest.raises(DataError, match="demo_0: .*no attribute.*'words'.*ep_meta"):
        open_dataset(replace(made, instruction=InstructionCard("demo", key="words")))
    with pytest.raises(ConfigError, match=r'"demo".*instruction\.key|\'demo\'.*instruction\.key'):
        open_dataset(replace(made, instruction=InstructionCard("demo")))


def test_one_of_several_sentences_is_chosen_by_the_episode_and_a_missing_file_is_named(
    tmp_path: Path,
) -> None:
    made = robotwin(tmp_path / "set", EVERYTHING)
    for path in (tmp_path / "set").rglob("*.json"):
        path.write_text(json.dumps({"seen": [f"say {n}" for n in range(9)]}))
    first, second = open_dataset(made), open_dataset(made)
    assert first.episodes == second.episodes
    assert len({info.instruction for info in first.episodes}) > 1
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}, which is missing"):
        open_dataset(made)


# -------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("write", [aloha, lerobot_files.write, hdf5_writers.any_hdf5])
def test_episodes_on_the_skip_list_are_not_looked_into(write: Callable[..., Card], tmp_path: Path) -> None:
    made = write(tmp_path / "set", EVERYTHING)
    ids = [info.id for info in open_dataset(made).episodes]
    pattern = f"*{ids[4][-3:]}"
    chosen = [i for i in ids if i != ids[0] and not i.endswith(ids[4][-3:])]
    store = open_dataset(replace(made, episodes=EpisodesCard(skip=(ids[0], pattern))))
    assert [info.id for info in store.episodes] == chosen
    assert {left.id for left in store.left_out} == set(ids) - set(chosen)
    with pytest.raises(DataError, match=r"episodes\.skip.*not there: nobody"):
        open_dataset(replace(made, episodes=EpisodesCard(skip=("nobody",))))
    with pytest.raises(DataError, match=r"no episode is left of 6"):
        open_dataset(replace(made, episodes=EpisodesCard(skip=("*",))))


def test_episodes_without_success_are_left_out(tmp_path: Path) -> None:
    made = maniskill(tmp_path / "set", EVERYTHING)
    with h5py.File(tmp_path / "set" / f"{TASKS[1]}.h5", "r+") as file:
        file["traj_1/success"][:] = False  # type: ignore[index]
    store = open_dataset(made)
    assert len(store.episodes) == 5
    assert [(left.id, left.reason) for left in store.left_out] == [(f"{TASKS[1]}/traj_1", "success is false")]
    with pytest.raises(DataError, match=r"episodes\.success: .*no attribute.*'succes'"):
        open_dataset(replace(made, episodes=EpisodesCard(success="succes")))


def test_what_cannot_be_read_stops_or_is_left_out_with_its_reason(tmp_path: Path) -> None:
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    with h5py.File(tmp_path / "set" / f"{TASKS[0]}_demo.hdf5", "r+") as file:
        file["data/demo_1/actions"][2, 1] = np.nan  # type: ignore[index]
        del file["data/demo_2/obs/ee_pos"]
    (tmp_path / "set" / "z_demo.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(DataError, match="demo_1: actions holds nan"):
        open_dataset(made)
    store = open_dataset(replace(made, episodes=EpisodesCard(on_bad="skip")))
    assert len(store.episodes) == 4
    reasons = {left.id: left.reason for left in store.left_out}
    assert list(reasons) == [f"{TASKS[0]}_demo/demo_1", f"{TASKS[0]}_demo/demo_2", "z_demo"]
    assert "actions holds nan at step 2" in reasons[f"{TASKS[0]}_demo/demo_1"]
    assert "no dataset 'obs/ee_pos'" in reasons[f"{TASKS[0]}_demo/demo_2"]
    assert "cannot be read as HDF5" in reasons["z_demo"]


def test_a_bad_lerobot_episode_is_left_out(tmp_path: Path) -> None:
    made = lerobot_files.write(tmp_path / "set", EVERYTHING, "v2.1")
    (tmp_path / "set/data/chunk-000/episode_000002.parquet").unlink()
    with pytest.raises(DataError, match=r"episode_000002\.parquet"):
        open_dataset(made)
    store = open_dataset(replace(made, episodes=EpisodesCard(on_bad="skip")))
    assert [left.id for left in store.left_out] == ["episode_000002"] and len(store.episodes) == 5


# ------------------------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("1.0.0/dataset_info.json", "1.0.0/set-train.tfrecord-00000-of-00001"), "RLDS.*any4lerobot"),
        (("features.json", "set-train.tfrecord-00000-of-00001"), "RLDS.*any4lerobot"),
        (("replay.zarr/.zgroup",), "zarr.*umi2lerobot"),
        (("zarr.json",), "zarr.*umi2lerobot"),
        (("bridge/1.0.0/features.json", "bridge/1.0.0/bridge-train.tfrecord-00000-of-00010"), "RLDS.*any4le"),
        (("replay.zarr.zip",), r"replay\.zarr\.zip: is a zarr.*unzip it.*umi2lerobot"),
        (("umi/replay.zarr.zip",), r"replay\.zarr\.zip: is a zarr.*unzip it.*umi2lerobot"),
    ],
)
def test_rlds_and_zarr_are_refused_naming_a_converter(
    names: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=kind):
        layouts.recognise(tmp_path)


def test_everything_that_a_card_says_survives_being_written(tmp_path: Path) -> None:
    made = robotwin(tmp_path / "set", EVERYTHING)
    made = replace(made, episodes=EpisodesCard(("a*",), "success", "skip"))
    (tmp_path / "card.toml").write_text(card_text(made))
    again = load_card(tmp_path / "card.toml")
    assert replace(again, file=None, section=None) == made


def test_every_card_that_the_documentation_shows_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
    shown = [block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "layout = " in block]
    for number, block in enumerate(shown):
        (tmp_path / f"{number}.toml").write_text(block)
    read = [load_card(tmp_path / f"{number}.toml") for number in range(len(shown))]
    shown_layouts = {"aloha", "droid", "robotwin", "maniskill", "robocasa", "generic"}
    assert {made.layout for made in read} == shown_layouts


# ---------------------------------------------------------------------------------- success, skip, sentences


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.nan, "holds nan, not true or false"),
        (np.array([0.0, 0.3, 0.9]), "holds 0.3, not true or false"),
        (-1, "holds -1, not true or false"),
        ("True", "'True', not true or false"),
        (np.zeros((4, 2, 3), np.uint8), "not true or false, or one of them for each step"),
    ],
    ids=["NaN", "a reward", "a code", "a word", "frames"],
)
def test_a_success_that_is_neither_true_nor_false_is_refused(values: Any, says: str, tmp_path: Path) -> None:
    """NaN, rewards and codes of failure counted as success."""
    made = hdf5_writers.any_hdf5(tmp_path / "set", EVERYTHING)
    with h5py.File(tmp_path / "set" / "log.h5", "a") as file:
        for group in file["runs"].values():  # type: ignore[union-attr]
            group["won"] = values
    with pytest.raises(DataError, match=f"take-0: episodes.success: won .*{says}"):
        open_dataset(replace(made, episodes=EpisodesCard(success="won")))


def test_a_success_in_a_lerobot_dataset_is_true_or_false(tmp_path: Path) -> None:
    made = lerobot_files.write(tmp_path / "set", EVERYTHING)
    with pytest.raises(DataError, match=r"episode 0: episodes.success: timestamp holds 0\.05, not true"):
        open_dataset(replace(made, episodes=EpisodesCard(success="timestamp")))


def test_a_skipped_id_that_is_not_there_comes_with_one_that_is(tmp_path: Path) -> None:
    made = hdf5_writers.any_hdf5(tmp_path / "set", EVERYTHING)
    says = r"what is not there: take-1; an id is 'log/runs/take-0', a pattern '\*/take-0'"
    with pytest.raises(DataError, match=says):
        open_dataset(replace(made, episodes=EpisodesCard(skip=("take-1",))))


def test_a_sentence_that_no_episode_has_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A slip in the name of a file left it the sentence of all others."""
    made = aloha(tmp_path / "set", EVERYTHING)
    instruction = InstructionCard("card", "fold it", {TASKS[0]: "open it", "turn_onn": "turn it on"})
    store = open_dataset(replace(made, instruction=instruction))
    assert {info.instruction for info in store.episodes} == {"open it", "fold it"}
    assert "instruction.files names what no episode is of: 'turn_onn'" in caplog.text


def test_a_shift_by_more_rows_than_an_episode_has_is_refused_in_both_directions(tmp_path: Path) -> None:
    made = aloha(tmp_path / "set", EVERYTHING)
    for shift, left in ((9, "step"), (-9, "action but the first")):
        with pytest.raises(DataError, match=f"action_shift = {shift} leaves no {left} of .* has 4 rows"):
            open_dataset(replace(made, rows=RowsCard(action_shift=shift)))


def test_an_empty_group_is_no_demonstration_only_where_the_pattern_takes_any_name(tmp_path: Path) -> None:
    """`runs/take-*` names demonstrations: one without a dataset is a recording that broke off."""
    made = hdf5_writers.any_hdf5(tmp_path / "set", EVERYTHING)
    with h5py.File(tmp_path / "set" / "log.h5", "a") as file:
        file.create_group("runs/take-9")
    with pytest.raises(DataError, match="take-9: has no attribute and no dataset 'words'"):
        open_dataset(made)
    store = open_dataset(replace(made, section=generic.Section("runs/*")))
    assert len(store.episodes) == len(EVERYTHING)
