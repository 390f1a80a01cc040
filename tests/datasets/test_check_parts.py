"""`vlafit data check` finds damage to a part of an episode, and delays of one step, with kind and place."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.datasets.arm_recordings import STEPS, Episode, Recording, recorded
from tests.variants import variants
from vlafit.datasets.checks import Finding, check_store
from vlafit.datasets.checks.clips import PARTS

BAD = 5


def gripped(seed: int) -> list[Episode]:
    """Episodes whose gripper is commanded by 0 and 1, and follows within three steps."""
    episodes = []
    for number, e in enumerate(recorded(seed)):
        closes = 30 + 4 * number
        command = (np.arange(STEPS) >= closes).astype(np.float32)
        at = np.clip((np.arange(STEPS) - closes) / 3, 0, 1).astype(np.float32)
        actions, state = e.actions.copy(), e.state.copy()
        actions[:, 2], state[:, 2] = command, at
        episodes.append(replace(e, actions=actions, state=state))
    return episodes


def some(share: float) -> slice:
    return slice(20, 20 + round(share * STEPS))


def findings_of(episodes: list[Episode], *, pixels: bool) -> list[Finding]:
    return list(check_store(Recording(episodes), pixels=pixels).findings)


def with_sign_turned(seed: int, dimension: int, share: float) -> list[Episode]:
    episodes = gripped(seed)
    actions = episodes[BAD].actions.copy()
    actions[some(share), dimension] = (1 if dimension == 2 else 0) - actions[some(share), dimension]
    episodes[BAD] = replace(episodes[BAD], actions=actions)
    return episodes


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_gripper_whose_sign_is_turned_in_a_part_of_an_episode_is_found_with_its_steps(
    share: float, seed: int
):
    (found,) = findings_of(with_sign_turned(seed, 2, share), pixels=False)
    assert (found.kind, found.episode, found.severity) == ("action_sign", f"episode_{BAD}", "error")
    assert (found.step, found.step + found.steps) == (20, some(share).stop)
    assert f"from step 20 to {some(share).stop - 1}" in found.message


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_a_sign_that_is_turned_in_a_part_of_an_episode_is_found(dimension: int, share: float, seed: int):
    """By its kind, or as an action that does not follow its state: it may be near 0 in that part."""
    findings = findings_of(with_sign_turned(seed, dimension, share), pixels=False)
    assert {f.episode for f in findings} == {f"episode_{BAD}"}
    assert {f.kind for f in findings} & {"action_sign", "noisy"}


@pytest.mark.parametrize("seed", variants(range(6), always=[0]))
def test_no_part_of_a_clean_episode_is_called_turned(seed: int):
    assert "action_sign" not in {f.kind for f in findings_of(gripped(seed), pixels=False)}


def test_a_gripper_that_holds_an_object_in_one_episode_is_not_turned():
    episodes = gripped(0)
    state = episodes[BAD].state.copy()
    state[:, 2] = np.minimum(state[:, 2], 0.4)
    episodes[BAD] = replace(episodes[BAD], state=state)
    assert "action_sign" not in {f.kind for f in findings_of(episodes, pixels=False)}


def test_a_sign_that_could_be_turned_unseen_is_said():
    episodes = gripped(0)
    rng = np.random.default_rng(0)
    noisy = [
        replace(e, state=e.state + rng.normal(0, 0.3, e.state.shape).astype(np.float32)) for e in episodes
    ]
    said = [t for t in check_store(Recording(noisy), pixels=False).not_tested if t.test == "action_sign"]
    assert any("turned in a quarter of an episode would not be found" in test.reason for test in said)


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
@pytest.mark.parametrize("late", [True, False])
def test_actions_that_are_one_step_late_or_early_are_called_so(late: bool, seed: int):
    episodes = recorded(seed)
    a = episodes[BAD].actions
    moved = np.concatenate([a[:1], a[:-1]]) if late else np.concatenate([a[1:], a[-1:]])
    episodes[BAD] = replace(episodes[BAD], actions=moved)
    (found,) = findings_of(episodes, pixels=False)
    assert (found.kind, found.episode) == ("action_lag", f"episode_{BAD}")
    assert f"actions come 1 step {'after' if late else 'before'}" in found.message


CHANGES: dict[str, Callable[[NDArray], NDArray]] = {
    "channel_order": lambda f: f[..., ::-1],
    "upside_down": lambda f: f[:, ::-1, ::-1],
    "flipped_vertically": lambda f: f[:, ::-1],
    "flipped_horizontally": lambda f: f[:, :, ::-1],
}


@pytest.mark.parametrize("share", variants([0.25, 0.5, 0.75], always=[0.25]))
@pytest.mark.parametrize(
    "kind", variants([*CHANGES, "cameras_swapped"], always=["channel_order", "cameras_swapped"])
)
def test_a_camera_that_is_turned_or_swapped_in_a_part_of_an_episode_is_found_with_its_steps(
    kind: str, share: float
):
    episodes = recorded(1)
    front, wrist = episodes[BAD].front.copy(), episodes[BAD].wrist.copy()
    if kind == "cameras_swapped":
        front[some(share)], wrist[some(share)] = wrist[some(share)], front[some(share)].copy()
    else:
        front[some(share)] = CHANGES[kind](front[some(share)])
    episodes[BAD] = replace(episodes[BAD], front=front, wrist=wrist)
    findings = findings_of(episodes, pixels=True)
    assert {(f.kind, f.episode, f.severity) for f in findings} == {(kind, f"episode_{BAD}", "error")}
    room = 1.5 * STEPS / PARTS
    for found in findings:
        assert found.step is not None and abs(found.step - 20) <= room
        assert abs(found.step + found.steps - some(share).stop) <= room
        assert f"from about step {found.step}" in found.message


def test_episodes_shorter_than_the_number_of_parts_are_compared():
    episodes = [
        replace(e, state=e.state[:9], actions=e.actions[:9], front=e.front[:9], wrist=e.wrist[:9])
        for e in recorded(1)
    ]
    front = episodes[BAD].front.copy()
    front[5:] = front[5:, ::-1]
    episodes[BAD] = replace(episodes[BAD], front=front)
    assert ("flipped_vertically", f"episode_{BAD}") in {
        (f.kind, f.episode) for f in findings_of(episodes, pixels=True)
    }
