"""A late video in one of few episodes with small pictures is found, or said to be beyond the check."""

from dataclasses import replace

import pytest

from tests.datasets.arm_recordings import Episode, Recording, recorded
from tests.datasets.small_scenes import Path, late, scene
from tests.variants import variants
from vlafit.datasets.checks import Finding, check_store

BAD = 4


def shifts(store: Recording) -> tuple[set[str], list[str]]:
    """Return the episodes called shifted, and what is said of shifts that cannot be found."""
    checked = check_store(store)
    said = [gap.reason for gap in checked.not_tested if gap.test == "video_shift"]
    return {f.episode for f in checked.findings if f.kind == "video_shift"}, said


@pytest.mark.parametrize("seed", variants(range(4), always=[0]))
@pytest.mark.parametrize(
    ("path", "frames"),
    [("via points", 4), ("via points", 12), ("circle", 4), ("lissajous", 2), ("via points", 3)],
)
def test_a_late_video_is_found_in_one_of_eight_episodes_of_32_pixels(path: Path, frames: int, seed: int):
    episodes = [scene(path, number, seed) for number in range(8)]
    episodes[BAD] = late(episodes[BAD], frames)
    found, said = shifts(Recording(episodes))
    assert found == {f"episode_{BAD}"} and said in ([], ["fewer than 3 frames would not be found"])


@pytest.mark.parametrize("seed", variants(range(6), always=[0]))
@pytest.mark.parametrize(("path", "frames"), [("walk", 4), ("reach", 4)])
def test_a_late_video_is_found_or_the_check_says_that_it_would_not_be(path: Path, frames: int, seed: int):
    episodes = [scene(path, number, seed) for number in range(8)]
    episodes[BAD] = late(episodes[BAD], frames)
    found, said = shifts(Recording(episodes))
    assert found <= {f"episode_{BAD}"} and (found or said)


@pytest.mark.parametrize("path", ["via points", "circle", "walk", "lissajous"])
@pytest.mark.parametrize("seed", variants(range(6), always=[1]))
def test_no_video_of_a_clean_small_scene_is_called_late(path: Path, seed: int):
    assert shifts(Recording([scene(path, number, seed) for number in range(8)]))[0] == set()


def test_two_late_videos_are_found_and_the_others_are_not_blamed():
    episodes = [scene("via points", number, 0) for number in range(10)]
    for number in (2, BAD):
        episodes[number] = late(episodes[number], 6)
    assert shifts(Recording(episodes))[0] == {"episode_2", f"episode_{BAD}"}


def test_the_least_shift_that_would_be_found_is_said():
    """A single broad motion looks much the same some frames later."""
    found, (said,) = shifts(Recording([scene("reach", number, 0) for number in range(8)]))
    assert not found and "fewer than" in said and "would not be found" in said


def test_episodes_in_which_frames_do_not_show_the_state_are_said_to_be_untested():
    episodes = [scene("walk", number, 0) for number in range(8)]
    unrelated = [scene("walk", number, 1) for number in range(8)]
    mixed = []
    for e, other in zip(episodes, unrelated, strict=True):
        steps = min(len(e.state), len(other.state))
        mixed.append(type(e)(e.state[:steps], e.actions[:steps], other.front[:steps], other.front[:steps]))
    found, (said,) = shifts(Recording(mixed))
    assert not found and "the image changes as the state moves: correlation" in said


def mismatches(episodes: list[Episode]) -> dict[tuple[str, str], Finding]:
    """Return the findings of frames that are another episode's, by the episode and that one."""
    found = [f for f in check_store(Recording(episodes)).findings if f.kind == "video_mismatch"]
    return {(finding.episode, finding.other): finding for finding in found}


@pytest.mark.parametrize("seed", variants([0, 1, 2], always=[0]))
@pytest.mark.parametrize("cameras", [("front",), ("front", "wrist")])
def test_videos_that_two_episodes_exchanged_are_a_warning_with_both(cameras: tuple[str, ...], seed: int):
    clean = recorded(seed)
    episodes = list(clean)
    for one, other in ((3, BAD), (BAD, 3)):
        episodes[one] = replace(clean[one], **{camera: vars(clean[other])[camera] for camera in cameras})
    found = mismatches(episodes)
    assert set(found) == {("episode_3", "episode_4"), ("episode_4", "episode_3")}
    for finding in found.values():
        assert finding.severity == "warning" and finding.cameras[0] in cameras
        assert f"as the states of episode {finding.other} move (correlation 0.9" in finding.message


@pytest.mark.parametrize("seed", variants(range(6), always=[1]))
@pytest.mark.parametrize("path", variants(["via points", "walk", "lissajous", "reach"], always=["reach"]))
def test_no_video_of_a_clean_small_scene_is_called_another_episodes(path: Path, seed: int):
    assert not mismatches([scene(path, number, seed, noise=3.0) for number in range(9)])
