"""The places that meta/episodes gives an episode, in videos and among all rows: right, or refused by name."""

import codecs
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets.lerobot_files import FPS, key_of, write, write_video
from tests.datasets.test_lerobot import coloured
from tests.datasets.test_lerobot_traps import change_table
from vlafit.cli import main
from vlafit.datasets import Card, open_dataset
from vlafit.datasets.card import EpisodesCard
from vlafit.datasets.checks import check_declared
from vlafit.datasets.layouts import lerobot
from vlafit.datasets.write import card_text
from vlafit.errors import DataError, ranges

EVERYTHING = coloured((9, 4, 7, 12, 5, 6))
LENGTHS = [len(demo.actions) for demo in EVERYTHING]  # four and two in a file
FRONT = f"videos/{key_of('front')}"
Rows = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return filmed_card(write(tmp_path_factory.mktemp("places") / "set", EVERYTHING, codec="libx264"))


def filmed_card(card: Card) -> Card:
    cameras = tuple(replace(camera, height=48, width=64) for camera in card.robot.cameras)
    return replace(card, robot=replace(card.robot, cameras=cameras))


def changed(card: Card, folder: Path, change: Callable[[Rows], object]) -> Card:
    """Copy a dataset with other lines in meta/episodes, which `change` gets by the number of the episode."""
    shutil.copytree(card.path, folder)
    paths = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    together: Rows = {}
    for path in paths:
        change_table(path, lambda rows: together.update({row["episode_index"]: row for row in rows}))
    change(together)
    for path in paths:
        change_table(
            path, lambda rows: rows.__setitem__(slice(None), [together[r["episode_index"]] for r in rows])
        )
    return replace(card, path=str(folder))


def window(row: dict[str, Any], start: float, end: float) -> None:
    row[f"{FRONT}/from_timestamp"], row[f"{FRONT}/to_timestamp"] = start, end


def all_from_zero(rows: Rows) -> None:
    for row in rows.values():
        window(row, 0.0, row["length"] / FPS)


def exchange(one: int, other: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for name in ("from_timestamp", "to_timestamp"):
            a, b = rows[one], rows[other]
            a[f"{FRONT}/{name}"], b[f"{FRONT}/{name}"] = b[f"{FRONT}/{name}"], a[f"{FRONT}/{name}"]

    return change


def moved(number: int, frames: float) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for name in ("from_timestamp", "to_timestamp"):
            rows[number][f"{FRONT}/{name}"] += frames / FPS

    return change


def longer(number: int, frames: float) -> Callable[[Rows], None]:
    return lambda rows: rows[number].update(
        {f"{FRONT}/to_timestamp": rows[number][f"{FRONT}/to_timestamp"] + frames / FPS}
    )


WINDOWS: list[tuple[str, Callable[[Rows], object], str]] = [
    ("all from zero, as after a bad merge", all_from_zero, r"file-000\.mp4.*episode 0 .*episode 1 .*overlap"),
    ("another file's", lambda r: r[1].update({f"{FRONT}/file_index": 1}), r"file-001\.mp4.*overlap"),
    ("exchanged", exchange(0, 2), r"episode \d .*(overlap|frames at fps 20)"),
    ("a frame early", moved(2, -1), r"episode 1 .*episode 2 .*overlap"),
    ("one frame too short", longer(1, -1), r"episode 1 \(4 rows\).* which are 3 frames"),
    ("two frames too long", longer(5, 2), r"episode 5 .*frames at fps 20"),
    ("after the end of the file", moved(5, 3), r"file-001\.mp4: lasts .*episode 5"),
    ("negative", moved(0, -2), r"episode 0.*from -0\.1 to"),
    ("not a number", lambda r: r[3].update({f"{FRONT}/to_timestamp": float("nan")}), "episode 3.*nan"),
    ("no end", lambda r: r[3].update({f"{FRONT}/to_timestamp": None}), "episode 3 has no .*to_timestamp"),
]


@pytest.mark.case(
    section="data",
    report="pictures of another episode after a merge",
    user_has="a LeRobot v3.0 dataset whose windows (`from_timestamp`) overlap or have another length",
    now="refused when it is opened, naming file, episodes and camera",
)
@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WINDOWS], ids=[w[0] for w in WINDOWS])
def test_a_window_that_cannot_be_the_episodes_own_is_refused_when_opened(
    filmed: Card, change: Callable[[Rows], object], message: str, tmp_path: Path
):
    card = changed(filmed, tmp_path / "set", change)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(card)
    assert "front" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_frames_between_windows_and_times_rounded_to_less_than_half_a_frame_are_legal(
    filmed: Card, tmp_path: Path
):
    def rounded(rows: Rows) -> None:
        for row in rows.values():
            for name in ("from_timestamp", "to_timestamp"):
                row[f"{FRONT}/{name}"] = abs(row[f"{FRONT}/{name}"] - 0.2 / FPS)

    good = open_dataset(filmed)
    one = open_dataset(changed(filmed, tmp_path / "rounded", rounded))
    for number in range(len(EVERYTHING)):
        steps = list(range(LENGTHS[number]))
        assert (one.images(number, steps, "front") == good.images(number, steps, "front")).all()
    # an episode that was deleted from meta/episodes leaves its frames in the file
    gap = changed(filmed, tmp_path / "gap", lambda rows: None)
    first, second = sorted((tmp_path / "gap" / "meta" / "episodes").rglob("*.parquet"))
    change_table(first, lambda rows: rows.pop(1))
    for path, left in ((first, 1), (second, 2)):
        change_table(path, lambda rows, left=left: [_earlier(row, LENGTHS[1]) for row in rows[left == 1 :]])
    store = open_dataset(
        replace(gap, expect=replace(gap.expect, episodes=5, frames=sum(LENGTHS) - LENGTHS[1]))
    )
    assert (store.images(1, [2], "front") == good.images(2, [2], "front")).all()


def _earlier(row: dict[str, Any], rows: int) -> None:
    for name in ("dataset_from_index", "dataset_to_index"):
        row[name] -= rows


def test_the_other_episodes_open_once_the_one_in_doubt_is_left_out(filmed: Card, tmp_path: Path):
    card = changed(filmed, tmp_path / "set", moved(2, -1))
    without = replace(card, section=lerobot.Section(skip=(2,)))
    assert [e.id[-1] for e in open_dataset(without).episodes] == list("01345")
    named = replace(card, episodes=EpisodesCard(skip=("episode_000002",)))
    assert len(open_dataset(named).episodes) == 5
    with pytest.raises(DataError, match="overlap"):  # a part of the episodes is no statement on the others
        open_dataset(replace(card, section=lerobot.Section(episodes=(0, 1))))
    skipping = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip")))
    assert [left.id[-1] for left in skipping.left_out] == ["1", "2"]
    assert all("overlap" in left.reason for left in skipping.left_out)


@pytest.fixture(scope="module")
def one_each(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return filmed_card(write(tmp_path_factory.mktemp("v21") / "set", EVERYTHING, "v2.1", codec="libx264"))


@pytest.mark.parametrize("frames", [LENGTHS[3] + 2, LENGTHS[3] - 1])
def test_a_video_of_one_episode_has_as_many_frames_as_rows(one_each: Card, frames: int, tmp_path: Path):
    shutil.copytree(one_each.path, tmp_path / "set")
    card = replace(one_each, path=str(tmp_path / "set"))
    path = tmp_path / "set" / "videos" / "chunk-000" / key_of("front") / "episode_000003.mp4"
    longer = np.concatenate([EVERYTHING[3].front, EVERYTHING[3].front])[:, ::-1, ::-1]
    write_video(path, longer[:frames], "libx264")
    with pytest.raises(DataError) as caught:
        open_dataset(card)
    assert f"{path.name}: has {frames} frames, episode 3 has {LENGTHS[3]} rows" in str(caught.value)
    assert ("surplus_frames" in str(caught.value)) == (frames > LENGTHS[3])
    left = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip"))).left_out
    assert [one.id[-1] for one in left] == ["3"]
    meant = replace(card, section=lerobot.Section(surplus_frames=True))
    if frames < LENGTHS[3]:
        with pytest.raises(DataError, match="episode 3"):
            open_dataset(meant)
    else:
        read = open_dataset(meant).images(3, [LENGTHS[3] - 1], "front").astype(int)
        assert np.abs(read - EVERYTHING[3].front[-1]).max() <= 4  # neighbouring frames differ by 17


def test_a_window_longer_than_the_rows_can_be_allowed(filmed: Card, tmp_path: Path):
    card = changed(filmed, tmp_path / "set", longer(5, 1))
    with pytest.raises(DataError, match="surplus_frames"):
        open_dataset(card)
    meant = replace(card, section=lerobot.Section(surplus_frames=True))
    assert len(open_dataset(meant).episodes) == len(EVERYTHING)


INDICES: list[tuple[str, Callable[[Rows], object], str]] = [
    ("from the beginning", lambda r: r[1].update(dataset_from_index=0), "episode 1 has 4 rows.*which are 13"),
    ("of another length", lambda r: r[2].update(dataset_to_index=11), "episode 2 has 7 rows.*which are -2"),
    (
        "of other rows",
        lambda r: r[3].update(dataset_from_index=0, dataset_to_index=12),
        "episode 3 has dataset_from_index 0.*have 20 rows, and its first row has index 20",
    ),
]


@pytest.mark.parametrize(("change", "message"), [i[1:] for i in INDICES], ids=[i[0] for i in INDICES])
def test_numbers_of_rows_that_contradict_the_rows_are_refused(
    filmed: Card, change: Callable[[Rows], object], message: str, tmp_path: Path
):
    with pytest.raises(DataError, match=message):
        open_dataset(changed(filmed, tmp_path / "set", change))


def test_numbers_of_rows_may_be_those_of_the_rows_or_of_their_places(filmed: Card, tmp_path: Path):
    """A part of a dataset may keep the numbers of its rows; rows of a merged one may be numbered wrongly."""

    def cut(rows: Rows) -> None:
        for row in rows.values():
            _earlier(row, -100)

    def number(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["index"] += 100

    card = changed(filmed, tmp_path / "set", cut)
    for path in (tmp_path / "set" / "data").rglob("*.parquet"):
        change_table(path, number)
    assert len(open_dataset(card).episodes) == len(EVERYTHING)
    other = changed(filmed, tmp_path / "other", lambda rows: None)
    for path in (tmp_path / "other" / "data").rglob("*.parquet"):
        change_table(path, number)
    assert len(open_dataset(other).episodes) == len(EVERYTHING)


def test_frames_that_cannot_be_read_are_named_by_ranges_of_steps(one_each: Card, tmp_path: Path):
    shutil.copytree(one_each.path, tmp_path / "set")
    path = tmp_path / "set" / "videos" / "chunk-000" / key_of("front") / "episode_000003.mp4"
    write_video(path, np.ascontiguousarray(EVERYTHING[3].front), "libx264", fps=30)
    store = open_dataset(replace(one_each, path=str(tmp_path / "set")))
    with pytest.raises(DataError, match=r"has no frame at .*episode 3, .*front, steps 0 to 2, 5, 9 to 11$"):
        store.images(3, [0, 1, 2, 5, 9, 10, 11], "front")
    assert ranges([]) == "" and ranges([4]) == "4" and ranges(range(0, 20, 2), most=2) == "0, 2 and 8 more"


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_files_of_no_episode_are_a_finding(version: str, one_each: Card, filmed: Card, tmp_path: Path):
    good = one_each if version == "v2.1" else filmed
    shutil.copytree(good.path, tmp_path / "set")
    card = replace(good, path=str(tmp_path / "set"))
    some = replace(card, section=lerobot.Section(episodes=(0, 1)))
    one = replace(card, robot=replace(card.robot, cameras=card.robot.cameras[:1]))
    for clean in (card, some, one):
        assert not check_declared(open_dataset(clean))
    new = {
        "v2.1": [
            "data/chunk-000/episode_000006.parquet",
            f"videos/chunk-000/{key_of('wrist')}/episode_000006.mp4",
        ],
        "v3.0": ["data/chunk-000/file-007.parquet", f"videos/{key_of('wrist')}/chunk-000/file-007.mp4"],
    }[version]
    for name in new:
        path = tmp_path / "set" / name
        shutil.copy(next(path.parent.iterdir()), path)
        (path.parent / f"._{path.name}").write_bytes(b"")  # of an operating system
    (finding,) = check_declared(open_dataset(some))
    assert (finding.kind, finding.severity) == ("unnamed_files", "warning")
    assert "2 files" in finding.message and all(name in finding.message for name in new)


@pytest.mark.parametrize("name", ["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_text(name: str, one_each: Card, tmp_path: Path):
    shutil.copytree(one_each.path, tmp_path / "set")
    path = tmp_path / "set" / name
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    store = open_dataset(str(tmp_path / "set"))
    assert [info.length for info in store.episodes] == LENGTHS


def test_what_is_left_out_is_in_the_text_and_the_json_of_a_check(
    one_each: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(one_each.path, tmp_path / "set")
    next((tmp_path / "set" / "data").rglob("*episode_000003.parquet")).write_bytes(b"PAR1")
    card = replace(one_each, path=str(tmp_path / "set"), episodes=EpisodesCard(on_bad="skip"))
    path = tmp_path / "card.toml"
    path.write_bytes(codecs.BOM_UTF8 + card_text(card).encode())
    assert main(["data", "check", str(path), "--no-pixels", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left_out"]
    assert list(left) == ["episode_000003"] and "no whole parquet" in left["episode_000003"]
    assert main(["data", "check", str(path), "--no-pixels"]) == 0
    assert "left out: episode_000003: " in capsys.readouterr().out
