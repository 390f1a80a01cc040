"""DROID's raw layout: what is wrong in its files is named. What every layout must do is tested elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.datasets import droid_files
from tests.datasets.layouts import demos, in_file_order
from vlafit.datasets import describe, open_dataset
from vlafit.datasets.card import EpisodesCard
from vlafit.datasets.layouts import droid
from vlafit.errors import DataError

EVERYTHING = in_file_order(demos(2))


def test_a_card_may_name_the_folder_and_the_draft_has_the_cameras_with_a_video(tmp_path: Path):
    droid_files.write(tmp_path / "set", EVERYTHING[:2])
    draft = describe(tmp_path / "set")
    assert draft.card.layout == "droid" and not draft.missing
    assert [camera.name for camera in draft.card.robot.cameras] == ["wrist", "ext1", "ext2"]
    assert {"robot.hz", "robot.state.keys", "robot.action.keys"} <= set(draft.guesses)
    assert [e.id for e in open_dataset(tmp_path / "set").episodes] == ["AUTOLab+0", "TRI+1"]


def test_rows_without_movement_are_dropped_unless_the_card_keeps_them(tmp_path: Path):
    card = droid_files.write(tmp_path / "set", EVERYTHING[:2])
    dropped = open_dataset(card)
    whole = open_dataset(replace(card, section=droid.Section(idle="keep")))
    for number, demo in enumerate(EVERYTHING[:2]):
        extra = 2 + number % 2
        assert dropped.episodes[number].length == len(demo.actions)
        assert whole.episodes[number].length == len(demo.actions) + extra
        assert (whole.state(number)[0] == 77).all() and not (dropped.state(number) == 77).any()
        np.testing.assert_array_equal(whole.image(number, 1 + number, "wrist"), demo.wrist[0])


def test_a_video_with_fewer_frames_than_rows_is_named_or_left_out(tmp_path: Path):
    card = droid_files.write(tmp_path / "set", EVERYTHING[:2], cut=1)
    store = open_dataset(card)
    last = store.episodes[1].length - 1
    with pytest.raises(DataError, match=r"111\.mp4: .*\d+ frames.*TRI\+1 .*\d+ rows"):
        store.image(1, last, "wrist")
    skipping = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip")))
    assert [e.id for e in skipping.episodes] == ["AUTOLab+0"]
    assert skipping.left_out[0].id == "TRI+1" and "frames" in skipping.left_out[0].reason


def test_failures_are_left_out_by_the_success_that_the_recorder_wrote(tmp_path: Path):
    card = droid_files.write(tmp_path / "set", EVERYTHING[:2], failed=0)
    store = open_dataset(replace(card, episodes=EpisodesCard(success="success")))
    assert [e.id for e in store.episodes] == ["TRI+1"]
    assert [left.id for left in store.left_out] == ["AUTOLab+0"]


def test_a_missing_video_metadata_or_camera_is_named(tmp_path: Path):
    card = droid_files.write(tmp_path / "set", EVERYTHING[:2])
    wrong = replace(card.robot.cameras[0], key="ext3")
    with pytest.raises(DataError, match="no camera 'ext3'.*did you mean 'ext"):
        open_dataset(replace(card, robot=replace(card.robot, cameras=(wrong,))))
    video = next((tmp_path / "set").rglob("20.mp4"))
    video.rename(video.with_suffix(".svo"))
    with pytest.raises(DataError, match=r"camera 'ext1'.* 20.*missing \(100"):
        open_dataset(card)
    skipping = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip")))
    assert [e.id for e in skipping.episodes] == ["TRI+1"]
    next((tmp_path / "set").rglob("metadata_TRI*.json")).unlink()
    with pytest.raises(DataError, match="has 0 files metadata_"):
        open_dataset(card)


def test_a_serial_number_that_is_a_path_is_refused(tmp_path: Path):
    card = droid_files.write(tmp_path / "set", EVERYTHING[:1])
    path = next((tmp_path / "set").rglob("metadata_*.json"))
    content = json.loads(path.read_text())
    name = next(key for key in content if "serial" in key and "ext1" in key)
    path.write_text(json.dumps(content | {name: "../../../private"}))
    with pytest.raises(DataError) as caught:
        open_dataset(card)
    assert all(fact in str(caught.value) for fact in (str(path), name, "../../../private"))
