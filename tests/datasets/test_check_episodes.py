"""`vlafit data check` of one odd episode: copied dimensions, reversal, freezes, exchanged cameras."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.datasets.arm_recordings import STEPS, Episode, Recording, recorded
from tests.variants import variants
from vlafit.datasets.card import CameraCard
from vlafit.datasets.checks import Finding, check_store

BAD = 5


def found(episodes: Sequence[Episode], pixels: bool = False) -> list[Finding]:
    return list(check_store(Recording(list(episodes)), pixels=pixels).findings)


# -------------------------------------------------------------------------------- actions that are the state


def copied(e: Episode, dimensions: Sequence[int]) -> Episode:
    actions = e.actions.copy()
    actions[:, dimensions] = e.state[:, dimensions]
    return replace(e, actions=actions)


@pytest.mark.parametrize(("dimensions", "named"), [([0, 1], "x, y"), ([1], "y"), ([0, 2], "x, gripper")])
def test_dimensions_whose_action_is_the_present_state_are_named(dimensions: list[int], named: str):
    episodes = recorded()
    episodes[BAD] = copied(episodes[BAD], dimensions)
    (finding,) = found(episodes)
    assert (finding.kind, finding.severity) == ("action_equals_state", "error")
    assert finding.episode == f"episode_{BAD}"
    assert f"action {named} equals the present state" in finding.message


def test_a_copy_in_every_episode_is_one_finding_of_the_dataset():
    one = found([copied(e, [2]) for e in recorded()])
    assert [(f.kind, f.severity, f.episode) for f in one] == [("action_equals_state", "warning", "")]
    assert "action gripper" in one[0].message and "8 of 8" in one[0].message
    whole = found([copied(e, [0, 1, 2]) for e in recorded()])
    assert [(f.kind, f.severity, f.episode) for f in whole] == [("action_equals_state", "error", "")]
    assert "every action" in whole[0].message


def test_a_part_of_an_episode_in_which_actions_are_the_state_has_its_first_step():
    episodes = recorded()
    actions = episodes[BAD].actions.copy()
    actions[40:70] = episodes[BAD].state[40:70]
    episodes[BAD] = replace(episodes[BAD], actions=actions)
    (finding,) = [f for f in found(episodes) if f.kind == "action_equals_state"]
    assert finding.episode == f"episode_{BAD}" and (finding.step, finding.steps) == (40, 30)


def test_a_gripper_whose_command_and_state_change_once_at_the_same_step_is_no_copy():
    """A state of 0 or 1 in which command and measurement agree by chance in one episode."""
    episodes = []
    for number, e in enumerate(recorded()):
        state, actions = e.state.copy(), e.actions.copy()
        at = int((e.actions[:, 2] > 0.5).argmax())
        actions[:, 2] = np.arange(STEPS) >= at
        state[:, 2] = np.arange(STEPS) >= at + (0 if number == BAD else 2)
        episodes.append(replace(e, state=state, actions=actions))
    assert not [f for f in found(episodes) if f.kind == "action_equals_state"]


# -------------------------------------------------------------------------------------------------- reversal


def reversed_(e: Episode) -> Episode:
    return replace(e, state=e.state[::-1], actions=e.actions[::-1], front=e.front[::-1], wrist=e.wrist[::-1])


def velocities(e: Episode, gripper: bool = False) -> Episode:
    """Actions that are steps of the state, for all dimensions or all but the gripper."""
    rng = np.random.default_rng(0)
    actions = np.diff(e.state, axis=0, append=e.state[-1:]) + rng.normal(0, 1e-4, e.state.shape)
    if gripper:
        actions[:, 2] = e.actions[:, 2]
    return replace(e, actions=actions.astype(np.float32))


def centred(e: Episode, number: int) -> Episode:
    """The same with an arm that begins anywhere, and a gripper that opens in every second episode."""
    sign = np.float32([1, 1, -1 if number % 2 else 1])
    rng = np.random.default_rng(number)
    start = rng.normal(0, 0.3, 3).astype(np.float32)
    return replace(e, state=e.state * sign + start, actions=e.actions * sign + start)


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
def test_a_reversed_episode_is_called_so(seed: int):
    episodes = recorded(seed)
    episodes[BAD] = reversed_(episodes[BAD])
    kinds = {(f.kind, f.episode) for f in found(episodes)}
    assert ("played_backwards", f"episode_{BAD}") in kinds
    assert not {kind for kind, _ in kinds} & {"action_lag", "action_sign"}


@pytest.mark.parametrize("gripper", [False, True])
def test_a_reversed_episode_of_velocities_is_no_turned_sign(gripper: bool):
    episodes = [velocities(e, gripper) for e in recorded()]
    assert found(episodes) == []
    episodes[BAD] = reversed_(episodes[BAD])
    kinds = {(f.kind, f.episode) for f in found(episodes)}
    assert ("played_backwards", f"episode_{BAD}") in kinds and "action_sign" not in {
        kind for kind, _ in kinds
    }
    turned = [velocities(e, gripper) for e in recorded()]
    signs = np.float32([-1, -1, 1 if gripper else -1])
    turned[BAD] = replace(turned[BAD], actions=turned[BAD].actions * signs)
    assert {f.kind for f in found(turned)} == {"action_sign"}


def test_where_a_delay_and_a_reversal_look_alike_the_finding_names_both():
    episodes = [centred(e, number) for number, e in enumerate(recorded())]
    assert found(episodes) == []
    episodes[BAD] = reversed_(episodes[BAD])
    (lag,) = [f for f in found(episodes) if f.kind == "action_lag"]
    assert lag.episode == f"episode_{BAD}" and "played backwards" in lag.message


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_an_episode_whose_actions_are_late_is_not_called_reversed(steps: int):
    episodes = recorded()
    late = np.concatenate([episodes[BAD].actions[:1].repeat(steps, 0), episodes[BAD].actions[:-steps]])
    episodes[BAD] = replace(episodes[BAD], actions=late)
    assert {f.kind for f in found(episodes)} == {"action_lag"}


# --------------------------------------------------------------------------------------------------- freezes


def rendered(e: Episode, pause: int, seed: int) -> Episode:
    """A scene without noise, whose image repeats bit for bit where the arm pauses; the state has noise."""
    rng = np.random.default_rng(seed)
    held = np.concatenate([np.arange(40), np.full(pause, 40), np.arange(40, STEPS - pause)])
    y, x = np.mgrid[0:48, 0:64] / 64
    frames = np.stack(
        [np.exp(-((x - 0.5 - px) ** 2 + (y - 0.4 - py) ** 2) / 0.01) for px, py, _ in e.state[held].round(3)]
    )
    front = np.clip(60 + 190 * frames[..., None] * [1, 0.8, 0.5], 0, 255).astype(np.uint8)
    state = e.state[held] + rng.normal(0, 5e-4, e.state.shape).astype(np.float32)
    return replace(e, state=state, actions=e.actions[held], front=front, wrist=front[..., ::-1])


@pytest.mark.parametrize("pauses", [range(8, 43, 7), [0] * 4 + [45], [45]])
def test_frames_that_repeat_while_the_arm_pauses_are_no_freeze(pauses: Sequence[int]):
    episodes = [rendered(e, pause, n) for n, (e, pause) in enumerate(zip(recorded(), pauses, strict=False))]
    still = {"frozen_frames", "repeated_frames"}
    assert not [f for f in found(episodes, pixels=True) if f.kind in still]


def test_a_freeze_in_a_scene_without_noise_is_found():
    episodes = [rendered(e, 20, n) for n, e in enumerate(recorded(episodes=6))]
    front = episodes[BAD].front.copy()
    front[10:30] = front[10]
    episodes[BAD] = replace(episodes[BAD], front=front)
    (freeze,) = [f for f in found(episodes, pixels=True) if f.kind == "frozen_frames"]
    assert (freeze.episode, freeze.cameras) == (f"episode_{BAD}", ("front",))
    assert freeze.step is not None and 10 < freeze.step + freeze.steps <= 31


def test_slow_motion_that_is_less_than_a_pixel_is_no_freeze():
    """A coarse image of a slow arm repeats for some steps in every episode."""
    episodes = []
    for n, e in enumerate(recorded()):
        coarse = rendered(replace(e, state=(e.state * 25).round() / 25), 0, n)
        episodes.append(replace(coarse, state=e.state))
    assert not [f for f in found(episodes, pixels=True) if f.kind == "frozen_frames"]


# ---------------------------------------------------------------------------------------- exchanged cameras

Rotate = Literal[0, 180]


class Declared(Recording):
    """Recordings whose frames are stored as their cameras' cards say, and read back upright."""

    def __init__(self, recorded: list[Episode], front: dict, wrist: dict) -> None:
        super().__init__(recorded)
        cameras = tuple(
            replace(camera, **options)
            for camera, options in zip(self.card.robot.cameras, (front, wrist), strict=True)
        )
        self.card = replace(self.card, robot=replace(self.card.robot, cameras=cameras))
        self.declared: dict[str, CameraCard] = {camera.name: camera for camera in cameras}
        self.exchanged: set[int] = set()

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        other = {"front": "wrist", "wrist": "front"}[camera]
        shown = other if episode in self.exchanged else camera
        stored = self.declared[shown].upright(super().images(episode, steps, shown))
        return self.declared[camera].upright(stored)  # the first undid itself


@pytest.mark.parametrize(
    ("front", "wrist"),
    [
        ({"rotate": 180}, {}),
        ({}, {"rotate": 180}),
        ({"flip": "vertical"}, {"flip": "horizontal"}),
        ({"rotate": 180, "channels": "bgr"}, {"channels": "rgb"}),
        ({}, {}),
    ],
)
def test_cameras_exchanged_in_the_file_are_found_whatever_the_card_does_to_each(front: dict, wrist: dict):
    store = Declared(recorded(episodes=6), front, wrist)
    store.exchanged = {BAD}
    findings = check_store(store).findings
    assert {f.episode for f in findings} == {f"episode_{BAD}"}
    both = {("front", "wrist"), ("wrist", "front")}
    assert {f.cameras for f in findings if f.kind == "cameras_swapped"} == both


# --------------------------------------------------------------------------------- frames out of order


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
def test_frames_out_of_order_are_found_and_named(seed: int):
    episodes = recorded(seed, episodes=6)
    front = episodes[BAD].front.copy()
    front[20:60] = front[np.random.default_rng(1).permutation(np.arange(20, 60))]
    episodes[BAD] = replace(episodes[BAD], front=front)
    (finding,) = [f for f in found(episodes, pixels=True) if f.kind == "frames_out_of_order"]
    assert (finding.episode, finding.cameras) == (f"episode_{BAD}", ("front",))
    assert finding.step is not None and 14 <= finding.step < 60
