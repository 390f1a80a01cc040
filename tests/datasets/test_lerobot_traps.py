"""LeRobot datasets as recorders, mergers and other trainers write them: read right, or refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets.layouts import Demo, demos
from tests.datasets.lerobot_files import write
from vlafit.datasets import Card, EpisodeStore, describe, load_card, open_dataset
from vlafit.datasets.card import EpisodesCard
from vlafit.datasets.layouts import lerobot
from vlafit.errors import DataError

EVERYTHING = demos(3)  # six episodes, of four and two in a file


FEATURES = ("observation.images.front", "observation.images.wrist", "observation.state", "action")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return write(tmp_path_factory.mktemp("traps") / "set", EVERYTHING)


@pytest.fixture
def card(written: Card, tmp_path: Path) -> Card:
    shutil.copytree(written.path, tmp_path / "set")
    return replace(written, path=str(tmp_path / "set"))


def root(card: Card) -> Path:
    return Path(card.path)


def change_table(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def change_info(card: Card, change: Callable[[dict[str, Any]], object]) -> None:
    path = root(card) / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def rename(card: Card, names: dict[str, str]) -> None:
    """Give features other names, in info.json and in all tables."""

    def change(info: dict[str, Any]) -> None:
        info["features"] = {names.get(name, name): value for name, value in info["features"].items()}

    change_info(card, change)
    for path in root(card).glob("data/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)


def assert_read(store: EpisodeStore, some: list[Demo]) -> None:
    assert len(store.episodes) == len(some)
    for number, demo in enumerate(some):
        assert store.episodes[number].instruction == demo.instruction
        np.testing.assert_array_equal(store.state(number), demo.state)
        np.testing.assert_array_equal(store.actions(number), demo.actions.astype(np.float32))


def test_files_of_one_name_in_several_chunks_are_files_of_their_own(card: Card):
    """Merging restarts the numbers in each chunk (hflow's pull request 383: half of the videos were lost)."""
    for kind in ("data", "meta/episodes"):
        first, second = (root(card) / kind / f"chunk-00{n}" for n in (0, 1))
        second.mkdir()
        (first / "file-001.parquet").rename(second / "file-000.parquet")

    def move(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["data/chunk_index"], row["data/file_index"] = row["data/file_index"], 0

    for path in root(card).glob("meta/episodes/*/*.parquet"):
        change_table(path, move)
    store = open_dataset(card)
    assert_read(store, EVERYTHING)
    for number in (5, 0, 4, 3):
        assert (store.image(number, 2, "wrist") == EVERYTHING[number].wrist[2]).all()


def test_an_episode_whose_place_is_not_told_is_named(card: Card):
    path = root(card) / "meta/episodes/chunk-000/file-000.parquet"
    change_table(path, lambda rows: rows[1].update({"data/chunk_index": None}))
    with pytest.raises(DataError, match=r"episode 1 has no data/chunk_index"):
        open_dataset(card)


def test_a_part_of_the_episodes_keeps_their_numbers_and_counts_as_many(card: Card):
    store = open_dataset(replace(card, section=lerobot.Section(episodes=(1, 5))))
    assert [info.id for info in store.episodes] == ["episode_000001", "episode_000005"]
    assert_read(store, [EVERYTHING[1], EVERYTHING[5]])
    assert (store.image(1, 3, "wrist") == EVERYTHING[5].wrist[3]).all()


@pytest.mark.parametrize("column", ["task", "__index_level_0__"])
def test_a_sentence_is_found_by_its_number_and_never_by_its_row(card: Card, column: str):
    path = root(card) / "meta" / "tasks.parquet"
    tasks = pq.read_table(path).to_pydict()
    assert tasks["task_index"] == [0, 1]
    turned = {"task_index": [1, 0], column: tasks["task"][::-1]}
    pq.write_table(pa.table(turned), path)
    assert_read(open_dataset(card), EVERYTHING)


@pytest.mark.parametrize("shape", [[1], []])
@pytest.mark.parametrize("stored", ["flat", "lists"])
def test_a_column_of_one_dimension_is_one_however_it_is_stored(card: Card, shape: list[int], stored: str):
    for path in root(card).glob("data/*/*.parquet"):
        table = pq.read_table(path)
        values = pa.array([row[0] for row in table["action"].to_pylist()], pa.float32())
        if stored == "lists":
            values = pa.FixedSizeListArray.from_arrays(values, 1)
        pq.write_table(table.set_column(table.column_names.index("action"), "action", values), path)
    change_info(card, lambda info: info["features"]["action"].update(shape=shape, names=None))
    store = open_dataset(root(card))
    assert store.embodiment.action.shape == (1,)
    for number, demo in enumerate(EVERYTHING):
        np.testing.assert_array_equal(store.actions(number), demo.actions[:, :1].astype(np.float32))


@pytest.mark.parametrize(
    "names",
    [
        dict(zip(FEATURES, ("image", "wrist_image", "state", "actions"), strict=True)),
        dict(zip(FEATURES, ("observation.image", "observation.images.rgb.left_wrist"), strict=False)),
    ],
    ids=["as openpi converts", "nested"],
)
def test_features_of_other_names_need_no_card(card: Card, names: dict[str, str]):
    rename(card, names)
    drafted = load_card(root(card))
    assert [camera.key for camera in drafted.robot.cameras] == [
        names["observation.images.front"],
        names["observation.images.wrist"],
    ]
    store = open_dataset(drafted)
    assert_read(store, EVERYTHING)
    assert (store.image(3, 1, drafted.robot.cameras[1].name) == EVERYTHING[3].wrist[1]).all()


def test_features_whose_names_tell_nothing_need_a_card_that_names_them(card: Card):
    rename(card, {"observation.state": "joints"})
    with pytest.raises(DataError, match=r"(?s)needs a card.*robot\.state\.keys.*joints float32 \[5\]"):
        load_card(root(card))
    robot = replace(card.robot, state=replace(card.robot.state, keys=("joints",)))
    assert_read(open_dataset(replace(card, robot=robot)), EVERYTHING)


def test_whole_numbers_need_a_scale_and_are_scaled_before_they_are_rounded(card: Card):
    """Counts of an encoder beyond 2^24, which float32 does not hold."""
    change_info(card, lambda info: info["features"]["observation.state"].update(dtype="int64"))
    counts = {}
    for path in sorted(root(card).glob("data/*/*.parquet")):
        table = pq.read_table(path)
        rows = 20_000_000 + np.arange(5 * len(table)).reshape(-1, 5)
        counts[path] = rows
        column = table.schema.get_field_index("observation.state")
        pq.write_table(table.set_column(column, "observation.state", pa.array(rows.tolist())), path)
    with pytest.raises(DataError, match=r"observation.state is int64 .*robot\.state\.scale"):
        open_dataset(card).state(0)
    assert "for each of the 5 dimensions" in describe(root(card)).missing["robot.state.scale"]
    scale, offset = (0.5, 1.0, 1.0, -1.0, 1.0), (0.0, -20_000_000.0, 0.0, 0.0, 0.0)
    state = replace(card.robot.state, scale=scale, offset=offset)
    store = open_dataset(replace(card, robot=replace(card.robot, state=state)))
    rows = next(iter(counts.values()))[: store.episodes[0].length]
    expected = (rows * np.array(scale) + np.array(offset)).astype(np.float32)
    np.testing.assert_array_equal(store.state(0), expected)
    assert len(np.unique(expected[:, 1])) == len(expected)


def test_a_rate_is_the_same_as_a_whole_number_or_not(card: Card):
    change_info(card, lambda info: info.update(fps=20.0))
    assert open_dataset(card).embodiment.hz == open_dataset(root(card)).embodiment.hz == 20


def test_an_episode_without_rows_is_named_or_left_out(card: Card):
    def empty(rows: list[dict[str, Any]]) -> None:
        rows.append({**rows[-1], "episode_index": 6, "length": 0})

    change_table(root(card) / "meta/episodes/chunk-000/file-001.parquet", empty)
    with pytest.raises(DataError, match=r"episode 6 is empty; leave it out"):
        open_dataset(card)
    assert_read(open_dataset(replace(card, section=lerobot.Section(skip=(6,)))), EVERYTHING)
    store = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip")))
    assert_read(store, EVERYTHING)
    assert [left.id for left in store.left_out] == ["episode_000006"]


def test_statistics_of_the_folder_are_never_used(card: Card):
    """Merging leaves them as they were (LeRobot's issue 3788): they would normalise by another dataset's."""
    from vlafit.datasets.statistics_cache import statistics_of

    stats = {"action": {name: [1e6] * 4 for name in ("mean", "std", "min", "max", "q01", "q99")}}
    (root(card) / "meta" / "stats.json").write_text(json.dumps(stats))
    store = open_dataset(card)
    taken = statistics_of([store], [[info.id for info in store.episodes]], 1)["action"]
    rows = np.concatenate([demo.actions for demo in EVERYTHING])
    np.testing.assert_allclose(taken.mean, rows.mean(0), rtol=1e-5)


def test_state_and_action_of_one_feature_are_scaled_each_by_its_own(card: Card):
    state = replace(card.robot.state, keys=("action",), dimensions=4, labels=())
    action = replace(state, scale=(2.0, -1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.5, 0.0))
    store = open_dataset(replace(card, robot=replace(card.robot, state=state, action=action)))
    for number, demo in enumerate(EVERYTHING):
        rows = demo.actions.astype(np.float32)
        np.testing.assert_array_equal(store.state(number), rows)
        expected = (rows.astype(np.float64) * [2, -1, 1, 1] + [0, 0, 0.5, 0]).astype(np.float32)
        np.testing.assert_array_equal(store.actions(number), expected)
