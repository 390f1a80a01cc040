"""Frames of videos at any time, in any order, and how many are decoded on the way."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError

COUNT, FPS = 40, 20


def film(path: Path, options: dict[str, str], ticks: list[int] | None = None) -> list[NDArray[np.uint8]]:
    """Write a video whose frames differ, shown every tick of 1/FPS; return its frames as decoded in order."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"sc_threshold": "0", **options})
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 48, 64, "yuv420p", Fraction(1, FPS)
        for tick in ticks or range(COUNT):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), np.uint8), format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("options", [{"g": "2", "bf": "0"}, {"g": "12", "bf": "3"}, {"g": "1"}])
def test_frames_in_any_order_are_those_of_decoding_from_the_start(options: dict[str, str], tmp_path: Path):
    frames = film(tmp_path / "film.mp4", options)
    video = VideoFile(tmp_path / "film.mp4")
    for number in np.random.default_rng(1).permutation(COUNT).tolist():
        (picture,) = video.read([number / FPS], 0.5 / FPS)
        np.testing.assert_array_equal(picture, frames[number])
        (picture,) = video.read([number / FPS + 0.02 * (-1) ** number], 0.5 / FPS)  # stamps of a real clock
        np.testing.assert_array_equal(picture, frames[number])


def test_a_key_frame_is_decoded_by_itself_and_its_neighbour_with_it(tmp_path: Path):
    film(tmp_path / "film.mp4", {"g": "2", "bf": "0"})
    for number in range(0, COUNT, 3):
        video = VideoFile(tmp_path / "film.mp4")
        video.read([number / FPS], 0.5 / FPS)
        assert video.decoded == 1 + number % 2


def test_frames_that_follow_one_another_are_decoded_once(tmp_path: Path):
    film(tmp_path / "film.mp4", {"g": "12", "bf": "3"})
    video = VideoFile(tmp_path / "film.mp4")
    video.read([number / FPS for number in range(COUNT)], 0.5 / FPS)
    assert video.decoded == COUNT


def test_a_time_without_a_frame_is_named(tmp_path: Path):
    frames = film(tmp_path / "film.mp4", {"g": "2", "bf": "0"}, [*range(10), *range(20, 30)])
    video = VideoFile(tmp_path / "film.mp4")
    for missing in (0.75, 5.0):  # in a gap; after the end
        with pytest.raises(DataError, match=rf"film\.mp4.*{missing:.4f} s"):
            video.read([missing], 0.5 / FPS)
    (picture,) = video.read([1.0], 0.5 / FPS)
    np.testing.assert_array_equal(picture, frames[10])


@pytest.mark.parametrize(("group", "most"), [(2, 1.6), (12, 6.6)])
def test_frames_at_random_are_sought_and_no_group_between_is_decoded(group: int, most: float, tmp_path: Path):
    film(tmp_path / "film.mp4", {"g": f"{group}", "bf": "0"})
    video = VideoFile(tmp_path / "film.mp4")
    order = np.random.default_rng(2).integers(0, COUNT, 200).tolist()
    for number in order:
        video.read([number / FPS], 0.5 / FPS)
    assert video.decoded / len(order) <= most  # half a group and a half of a frame, by random starts in it
