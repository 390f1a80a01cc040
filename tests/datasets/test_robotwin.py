"""RoboTwin's video beside each file: frames that only it has, and colours that it tells."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.datasets.arm_recordings import HEIGHT, STEPS, WIDTH, recorded
from tests.datasets.droid_files import write_lossless
from tests.datasets.hdf5_writers import encoded
from vlafit.datasets import Card, describe, open_dataset
from vlafit.datasets.card import CameraCard, ColumnCard, InstructionCard, RobotCard, RowsCard
from vlafit.datasets.checks.beside import check_beside
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.layouts.robotwin import HEAD, VIDEO
from vlafit.errors import DataError

EPISODES = recorded(episodes=2)
JOINTS = tuple(f"joint_action/{one}" for one in ("left_arm", "left_gripper", "right_arm", "right_gripper"))


def write(folder: Path, *, head: str = "bgr", video: bool = True) -> Path:
    """Write two episodes; with head "" its frames are only in the video, "bgr" exchanges red and blue."""
    (folder / "data").mkdir(parents=True)
    for number, episode in enumerate(EPISODES):
        with h5py.File(folder / "data" / f"episode{number}.hdf5", "w") as file:
            file["joint_action/left_arm"] = file["joint_action/right_arm"] = episode.state[:, :2]
            file["joint_action/left_gripper"] = file["joint_action/right_gripper"] = episode.state[:, 2]
            file.create_group("observation")
            order = -1 if head == "bgr" else 1
            for key, frames in ((HEAD, episode.front), ("observation/left_camera/rgb", episode.wrist)):
                if head or key != HEAD:
                    rows = [encoded(frame[..., ::order]) for frame in frames]
                    file[key] = np.array(rows, f"S{max(map(len, rows))}")
        if video:
            write_lossless(folder / "video" / f"episode{number}.mp4", episode.front)
    return folder / "data"


def card(data: Path, *cameras: CameraCard) -> Card:
    columns = ColumnCard(JOINTS, 6)
    robot = RobotCard("aloha", 15, "joint_position", cameras, columns, columns)
    said = InstructionCard("card", "push")
    return Card("bowls", "robotwin", str(data), robot, said, rows=RowsCard(action_shift=1))


HEAD_CAMERA = CameraCard("head", HEAD, HEIGHT, WIDTH, channels="bgr")
LEFT = CameraCard("left", "observation/left_camera/rgb", HEIGHT, WIDTH, channels="rgb")
FILMED = CameraCard("head", VIDEO, HEIGHT, WIDTH)


def test_a_camera_of_the_video_beside_is_read_with_one_of_the_file(tmp_path: Path):
    store = open_dataset(card(write(tmp_path / "set", head=""), LEFT, FILMED))
    assert [info.length for info in store.episodes] == [STEPS - 1] * 2
    for number, episode in enumerate(EPISODES):
        for step in (0, 40, STEPS - 2):
            sample = store.sample(number, step, 3, history=2)
            assert np.array_equal(sample.observation.images["head"], episode.front[step])
            away = sample.observation.images["left"].astype(int) - episode.wrist[step]
            assert np.abs(away).mean() < 3  # JPEG
        assert np.array_equal(store.actions(number)[:, :2], episode.state[1:, :2])
    assert tmp_path / "set" / "video" / "episode1.mp4" in store.files()


def test_a_video_that_is_missing_or_of_another_length_is_named(tmp_path: Path):
    data = write(tmp_path / "set", head="")
    video = tmp_path / "set" / "video" / "episode1.mp4"
    for frames in (EPISODES[1].front[:-1], np.concatenate([EPISODES[1].front, EPISODES[1].front[:1]])):
        write_lossless(video, frames)
        with pytest.raises(
            DataError, match=f"episode1.mp4: has {len(frames)} frames, episode episode1 has {STEPS}"
        ):
            open_dataset(card(data, FILMED)).image(1, 0, "head")
    video.unlink()
    with pytest.raises(DataError, match=r"episode1.hdf5: camera key .*/video/episode1.mp4, which is missing"):
        open_dataset(card(data, FILMED))


@pytest.mark.parametrize("head", ["bgr", "rgb"])
def test_the_video_tells_the_order_of_red_and_blue_and_says_so(tmp_path: Path, head: str):
    drafted = describe(write(tmp_path / "set", head=head))
    assert {camera.channels for camera in drafted.card.robot.cameras} == {head}
    assert "episode0.mp4 shows the head camera" in drafted.guesses["robot.cameras.0.channels"]
    assert not [key for key in drafted.missing if "channels" in key]


def test_without_the_video_or_where_it_shows_something_else_the_order_is_asked_for(tmp_path: Path):
    write(tmp_path / "set", video=False)
    assert "robot.cameras.0.channels" in describe(tmp_path / "set" / "data").missing
    write_lossless(tmp_path / "set" / "video" / "episode0.mp4", 255 - EPISODES[1].wrist)
    assert "robot.cameras.0.channels" in describe(tmp_path / "set" / "data").missing


def test_files_without_frames_are_described_with_the_videos_camera(tmp_path: Path):
    data = write(tmp_path / "set", head="")
    for number in range(2):
        with h5py.File(data / f"episode{number}.hdf5", "a") as file:
            del file["observation/left_camera"]
    (camera,) = describe(data).card.robot.cameras
    assert (camera.name, camera.key, camera.height, camera.width) == ("head_camera", VIDEO, HEIGHT, WIDTH)


@pytest.mark.parametrize("right", ["bgr", "rgb"])
@pytest.mark.parametrize("rotate", [0, 180])
def test_check_names_a_card_whose_order_is_not_that_of_the_video(tmp_path: Path, right: str, rotate: int):
    data = write(tmp_path / "set", head=right)
    for stated in ("bgr", "rgb"):
        head = replace(HEAD_CAMERA, channels=stated, rotate=rotate)
        findings = check_beside(open_dataset(card(data, head, LEFT)), Untested())
        assert [f.kind for f in findings] == ([] if stated == right else ["channel_order"])
        assert not findings or ("episode0.mp4" in findings[0].message and findings[0].severity == "error")
