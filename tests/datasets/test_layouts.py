"""Every layout gives the same samples."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.hdf5_writers import any_hdf5, robotwin
from tests.datasets.layouts import (
    TASKS,
    Demo,
    card,
    demos,
    in_file_order,
    robomimic_card,
    write_libero,
    write_robomimic,
)
from vlafit.datasets import Card, ChunkDataset, open_dataset, split_episodes
from vlafit.datasets.card import InstructionCard
from vlafit.datasets.hdf5 import Hdf5Store
from vlafit.datasets.hdf5_demos import words_of
from vlafit.errors import DataError

FILENAME = InstructionCard("filename")


def original(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything))


def no_noops(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything, attrs=False, step=3), instruction=FILENAME)


def scenes(folder: Path, everything: list[Demo]) -> Card:
    written = write_libero(folder, everything, attrs=False, prefix="LIVING_ROOM_SCENE10_")
    return card(written, instruction=FILENAME)


def chunked(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything, chunks=True))


def compressed(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything, compression="gzip", shuffle=True))


def after_a_user_block(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything, userblock=1024))


def by_pattern(folder: Path, everything: list[Demo]) -> Card:
    write_libero(folder, everything)
    return card(folder / "*_demo.hdf5")


def robomimic(folder: Path, everything: list[Demo]) -> Card:
    return robomimic_card(write_robomimic(folder, everything))


LAYOUTS = [original, no_noops, scenes, chunked, compressed, after_a_user_block, by_pattern, robomimic]
Writer = Callable[[Path, list[Demo]], Card]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_decodes_to_the_same_episodes_in_natural_order(write: Writer, tmp_path: Path):
    everything = demos()
    store = open_dataset(write(tmp_path / "set", everything))
    expected = in_file_order(everything)
    assert [e.length for e in store.episodes] == [len(d.actions) for d in expected]
    assert [e.instruction for e in store.episodes] == [d.instruction for d in expected]
    for number, demo in enumerate(expected):
        state, actions = store.state(number), store.actions(number)
        assert state.dtype == actions.dtype == np.float32
        np.testing.assert_array_equal(state, demo.state)
        np.testing.assert_array_equal(actions, demo.actions.astype(np.float32))
        for step in (0, len(actions) - 1):
            np.testing.assert_array_equal(store.image(number, step, "front"), demo.front[step])
            np.testing.assert_array_equal(store.image(number, step, "wrist"), demo.wrist[step])


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_same_samples(write: Writer, tmp_path: Path):
    everything = demos(3)
    store = open_dataset(write(tmp_path / "set", everything))
    chunks = ChunkDataset([store], 4, [[e.id for e in store.episodes]])
    position = 0
    for demo in in_file_order(everything):
        for step in range(len(demo.actions)):
            sample = chunks[position]
            rows = np.minimum(np.arange(step, step + 4), len(demo.actions) - 1)
            np.testing.assert_array_equal(sample.actions, demo.actions[rows].astype(np.float32))
            assert sample.is_real.tolist() == [step + k < len(demo.actions) for k in range(4)]
            np.testing.assert_array_equal(sample.observation.state, demo.state[step])
            np.testing.assert_array_equal(sample.observation.images["front"], demo.front[step])
            assert sample.key[2] == step and sample.key[0] == "small"
            position += 1
    assert len(chunks) == position


@pytest.mark.parametrize(
    ("write", "mapped"), [(original, True), (after_a_user_block, True), (compressed, False)]
)
def test_contiguous_frames_are_memory_mapped_and_equal_what_h5py_reads(
    write: Writer, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_dataset(write(tmp_path / "set", demos(2)))
    assert isinstance(store, Hdf5Store)
    assert all((frames.offset >= 0) is mapped for e in store._episodes for frames in e.frames)
    through = [store._dataset(e.frames[1])[t] for e in store._episodes for t in range(4)]
    if mapped:
        monkeypatch.setattr(Hdf5Store, "_dataset", None)  # no way through h5py
    direct = [store.image(e, t, "wrist") for e in range(4) for t in range(4)]
    np.testing.assert_array_equal(through, direct)


def test_a_filter_key_chooses_demonstrations(tmp_path: Path):
    everything = demos(9)
    folder = write_robomimic(tmp_path / "set", everything)
    lengths = {}
    for mask in ("train", "valid", ""):
        store = open_dataset(robomimic_card(folder, mask=mask))
        lengths[mask] = [e.length for e in store.episodes if e.task == TASKS[0]]
    assert lengths["valid"] == [4, 8, 12]
    assert sorted(lengths["train"] + lengths["valid"]) == lengths[""] == list(range(4, 13))


def test_episode_ids_do_not_depend_on_where_the_files_are_or_how_many(tmp_path: Path):
    everything = demos(2)
    one = open_dataset(original(tmp_path / "a", everything))
    two = open_dataset(original(tmp_path / "b" / "c", everything))
    assert [e.id for e in one.episodes] == [e.id for e in two.episodes]
    single = open_dataset(card(tmp_path / "a" / f"{TASKS[0]}_demo.hdf5"))
    assert {e.id for e in single.episodes} < {e.id for e in one.episodes}
    assert one.episodes[0].id == "open_the_drawer_demo/demo_0" and one.episodes[0].task == "open_the_drawer"


def test_files_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path: Path):
    everything = demos(1)
    write_libero(tmp_path / "set" / "a", everything)
    write_libero(tmp_path / "set" / "b", everything)
    store = open_dataset(card(tmp_path / "set" / "*" / "*.hdf5"))
    assert len({e.id for e in store.episodes}) == len(store.episodes) == 4


@pytest.mark.case(
    section="data",
    report="no validation loss for my own HDF5 files",
    user_has="one episode in each file, whose name is all that tells tasks apart",
    now="files with one instruction are one task, of which the share of `data.validation` is held out",
)
def test_files_of_one_episode_hold_out_the_share_of_each_instruction(tmp_path: Path):
    everything = demos(10)
    for number, demo in enumerate(everything):
        made = any_hdf5(tmp_path / "set" / f"log_{number}", [demo])
    store = open_dataset(replace(made, path=str(tmp_path / "set" / "*" / "*.h5")))
    _, held_out = split_episodes(store, 0.2, 0)
    sentences = [store.episodes[store.index(i)].instruction for i in held_out]
    assert sorted(sentences) == sorted([demo.instruction for demo in everything[::5]])


def test_the_task_of_a_file_that_is_an_episode_is_its_folder_from_the_files_own_on(tmp_path: Path):
    """RoboTwin puts the files of every task into a folder called data."""
    everything = in_file_order(demos(2))
    made = robotwin(tmp_path / "one", everything)
    assert {e.task for e in open_dataset(made).episodes} == {f"{task}/data" for task in TASKS}
    single = replace(made, path=str(tmp_path / "one" / TASKS[0] / "data" / "*.hdf5"))
    assert {e.task for e in open_dataset(single).episodes} == {"data"}


@pytest.mark.parametrize(
    ("stem", "sentence"),
    [
        ("pick_up_the_bowl_demo", "pick up the bowl"),
        ("KITCHEN_SCENE3_turn_on_the_stove_demo", "turn on the stove"),
        ("LIVING_ROOM_SCENE10_open_it_demo", "open it"),
        ("STUDY_SCENE1_pick_up_the_book_demo", "pick up the book"),
    ],
)
def test_a_sentence_is_read_from_a_liberos_file_name(stem: str, sentence: str):
    assert words_of(stem) == sentence


def test_a_closed_store_reopens_when_needed(tmp_path: Path):
    for write in (original, compressed):
        store = open_dataset(write(tmp_path / write.__name__, demos(1)))
        before = store.image(0, 1, "wrist").copy()
        store.close()
        np.testing.assert_array_equal(store.image(0, 1, "wrist"), before)
        store.close()


@pytest.mark.parametrize("write", [original, compressed])
def test_a_file_that_changes_under_a_store_is_noticed_when_it_reopens(write: Writer, tmp_path: Path):
    store = pickle.loads(pickle.dumps(open_dataset(write(tmp_path / "set", demos(1)))))  # noqa: S301
    for path in (tmp_path / "set").iterdir():
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match="changed since the dataset was opened"):
        store.image(0, 0, "front")


@pytest.mark.case(
    section="data",
    report="`Bus error`, or training on other frames",
    user_has="a dataset that is overwritten or cut while a run reads it",
    now="one sentence with the file and both sizes",
)
@pytest.mark.parametrize("write", [original, compressed])
@pytest.mark.parametrize("change", ["truncated", "overwritten"])
def test_a_file_that_is_cut_or_overwritten_while_it_is_open_is_one_sentence(
    write: Writer, change: str, tmp_path: Path
):
    """A memory map that is read beyond the end of its file would end the process with SIGBUS."""
    store = open_dataset(write(tmp_path / "set", demos(1)))
    store.image(0, 0, "front")
    for path in (tmp_path / "set").iterdir():
        size = path.stat().st_size
        if change == "truncated":
            os.truncate(path, size // 2)
        else:
            path.write_bytes(bytes(size))
            os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="hdf5: changed.*--resume"):
        store.image(0, 1, "front")


def test_recorded_columns_cannot_be_written_to(tmp_path: Path):
    store = open_dataset(original(tmp_path / "set", demos(1)))
    for array in (store.state(0), store.actions(0), store.image(0, 0, "wrist")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
