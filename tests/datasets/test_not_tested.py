"""`vlafit data check` says which tests could not run, on what, and why."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.arm_recordings import STEPS, Episode, Recording, recorded
from tests.datasets.layouts import demos, in_file_order
from tests.datasets.lerobot_files import write
from vlafit.cli import main
from vlafit.datasets import checks
from vlafit.datasets.checks import TESTS, Checked, check_store

DRIVEN = {"dead_dimension", "action_sign", "action_lag", "played_backwards", "scale"}
TOO_SHORT = {"video_shift", "spike", "frames_out_of_order"}
UNDECLARED = {
    "form",
    "outside_limits",
    "stale_statistics",
    "channel_order_beside",
    "failed_episodes",
}  # of these recordings


def skipped(episodes: list[Episode], pixels: bool = True) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Return, for each test that did not run, what it did not run on, and why."""
    found: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for test in check_store(Recording(episodes), pixels=pixels).not_tested:
        assert test.reason and test.needs and test.finds
        found.setdefault(test.test, []).append((test.on, test.reason))
    return found


def test_on_whole_recordings_only_what_the_card_does_not_declare_is_not_tested():
    assert set(skipped(recorded())) == UNDECLARED


def _short(e: Episode) -> Episode:
    return Episode(e.state[:20], e.actions[:20], e.front[:20], e.wrist[:20])


def _still(e: Episode) -> Episode:
    return replace(e, state=e.state[:1].repeat(STEPS, 0), actions=e.actions[:1].repeat(STEPS, 0))


def _dark(e: Episode) -> Episode:
    return replace(e, front=e.front * 0 + 40, wrist=e.front * 0 + 40)


def _noise(e: Episode) -> Episode:
    rng = np.random.default_rng(int(1e6 * abs(float(e.state[0, 0]))))
    return replace(e, actions=rng.normal(size=e.actions.shape).astype(np.float32))


def _apart(e: Episode) -> Episode:
    return replace(e, instruction=f"do {e.state[0, 0]}")


CASES: dict[str, tuple[Callable[[list[Episode]], list[Episode]], set[str]]] = {
    "one episode": (
        lambda some: some[:1],
        {"duplicate_episode", "jump", "repeated_rows", "spike", *DRIVEN, "video_shift", "orientation"}
        | {"cameras_swapped", "looks", "repeated_frames", "duplicate_frames", "frames_out_of_order"},
    ),
    "three episodes": (
        lambda some: some[:3],
        {"jump", "repeated_rows", *DRIVEN, "video_shift", "orientation", "cameras_swapped", "looks"}
        | {"repeated_frames", "frames_out_of_order"},
    ),
    "short episodes": (lambda some: [_short(e) for e in some], {*DRIVEN, *TOO_SHORT}),
    "a robot that stands still": (
        lambda some: [_still(e) for e in some],
        {"action_equals_state", "jump", "repeated_rows", *DRIVEN, "frozen_frames", "video_shift"}
        | {"repeated_frames"},
    ),
    "images that never change": (
        lambda some: [_dark(e) for e in some],
        {"frozen_frames", "video_shift", "orientation", "cameras_swapped", "repeated_frames"}
        | {"same_cameras", "duplicate_frames", "frames_out_of_order"},
    ),
    "actions that move nothing": (lambda some: [_noise(e) for e in some], DRIVEN),
    "a sentence of its own for each": (
        lambda some: [_apart(e) for e in some],
        {"looks", "repeated_frames"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_tested_is_said(case: str):
    change, tests = CASES[case]
    assert set(skipped(change(recorded(episodes=5)))) - UNDECLARED == tests


def test_every_test_that_may_be_unable_to_run_has_a_case_here():
    everything = set().union(UNDECLARED, *(tests for _, tests in CASES.values()))
    conditional = {name for name, test in TESTS.items() if test.needs}
    # names are missing in the test below, and no recording here is without a frame
    assert conditional - everything == {"repeated_names", "black_frames", "unreadable_frames"}


def test_dimensions_without_a_name_and_frames_that_are_not_looked_at_are_said():
    store = Recording(recorded())
    robot = store.card.robot
    store.card = replace(store.card, robot=replace(robot, action=replace(robot.action, labels=())))
    checked = check_store(store, pixels=False)
    gaps = {test.test: test for test in checked.not_tested}
    assert gaps["repeated_names"].on == ("action",)
    assert all("--no-pixels" in gaps[test].reason for test in ("black_frames", "video_shift", "looks"))


def test_one_dimension_that_does_not_move_is_named_and_the_others_are_tested():
    episodes = [replace(e, actions=e.actions * np.float32([1, 1, 0])) for e in recorded()]
    gaps = skipped(episodes, pixels=False)
    assert all(gaps[test] == [(("action gripper",), "it does not move in most episodes")] for test in DRIVEN)
    episodes[5] = replace(episodes[5], actions=episodes[5].actions * np.float32([-1, 1, 1]))
    found = {(f.kind, f.episode) for f in check_store(Recording(episodes), pixels=False).findings}
    assert ("action_sign", "episode_5") in found


def test_episodes_that_disagree_are_said_instead_of_being_called_clean():
    for count, test in ((3, "action_sign"), (4, "action_lag")):
        turned = [
            replace(e, actions=e.actions * np.float32([1, 1, -1 if n < count else 1]))
            for n, e in enumerate(recorded())
        ]
        (on, reason), *_ = skipped(turned, pixels=False)[test]
        assert on == ("action gripper",) and str(count) in reason and "episodes" in reason
    scaled = [
        replace(e, actions=e.actions * np.float32([1 + 0.5 * (n % 3), 1, 1]))
        for n, e in enumerate(recorded())
    ]
    assert "proportion varies" in skipped(scaled, pixels=False)["scale"][0][1]


def test_every_kind_of_finding_belongs_to_a_test():
    kinds = {kind for test in TESTS.values() for kind in test.kinds}
    written = set()
    for path in Path(checks.__file__).parent.glob("*.py"):
        written |= set(re.findall(r'(?:Finding|_copy)\(\s*"(?:error|warning)",\s*"(\w+)"', path.read_text()))
    assert len(written) > 20 and written <= kinds


def test_text_and_json_say_what_was_not_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "set", in_file_order(demos(3)))
    assert main(["data", "check", str(tmp_path / "set"), "--json"]) == 0
    gaps = {gap["test"]: gap for gap in json.loads(capsys.readouterr().out)["not_tested"]}
    assert "0 of 6 episodes have 36 steps" in gaps["action_lag"]["reason"]
    assert gaps["action_lag"]["finds"] == ["action_lag"] and "36 steps" in gaps["action_lag"]["needs"]
    assert main(["data", "check", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr().out
    assert "nothing suspicious was found" in shown and "not tested: dead_dimension, action_sign" in shown
    assert "needs: 4 episodes" in shown


def test_a_check_has_no_gap_to_report_twice():
    checked: Checked = check_store(Recording(recorded()[:3]))
    assert len({(gap.test, gap.reason) for gap in checked.not_tested}) == len(checked.not_tested)
