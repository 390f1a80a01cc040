"""How chunks become actions, against LeRobot's recorded numbers and against plain definitions."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.serve.robots import ROBOT
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.execution import Execution, Limits, Plan
from vlafit.types import ActionChunk, Guidance

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "lerobot_rtc" / "recorded.json").read_text())


def chunk(first: int, steps: int = 6) -> ActionChunk:
    """A chunk whose actions say which chunk they are of, and which step they are for."""
    numbers = [(first, first + i) for i in range(steps)]
    return ActionChunk(np.array(numbers, np.float32))


def played(execution: Execution, rounds: int, steps: int = 6) -> list[tuple[int, int]]:
    plan, actions = Plan(execution), []
    for _ in range(rounds):
        plan.committed()
        actions += [tuple(map(int, action)) for action in plan.extend(chunk(plan.step, steps))]
    return actions


def test_open_loop_executes_the_first_steps_of_each_chunk() -> None:
    got = played(Execution(replan=2), 3)
    assert got == [(0, 0), (0, 1), (2, 2), (2, 3), (4, 4), (4, 5)]


def test_a_chunk_shorter_than_the_interval_is_executed_whole() -> None:
    assert played(Execution(replan=9), 2, steps=3) == [(0, 0), (0, 1), (0, 2), (3, 3), (3, 4), (3, 5)]


@pytest.mark.parametrize("mode", ["chunk", "real_time"])
def test_while_a_chunk_is_awaited_the_one_before_it_is_executed(mode: str) -> None:
    got = played(Execution(mode, replan=3, delay=2), 3)  # type: ignore[arg-type]
    assert got == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (3, 5), (3, 6), (3, 7), (6, 8)]
    assert [step for _, step in got] == list(range(9))  # no step is skipped, and none executed twice


def test_a_chunk_that_ends_before_the_next_one_is_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 steps.* 5 .replan. \+ 2 .delay.*at most 4"):
        played(Execution(replan=5, delay=2), 1)
    played(Execution(replan=4, delay=2), 3)


@pytest.mark.parametrize("decay", [0.01, 0.0, -0.5])
def test_temporal_ensembling_is_lerobots(decay: float) -> None:
    plan = Plan(Execution("ensemble", replan=1, decay=decay))
    got = [plan.extend(ActionChunk(np.array(one, np.float32)))[0] for one in RECORDED["chunks"]]
    np.testing.assert_allclose(got, RECORDED["ensembles"][str(decay)], rtol=0, atol=2e-6)


def test_an_ensemble_averages_the_chunks_that_are_there() -> None:
    plan = Plan(Execution("ensemble", replan=2, delay=1, decay=0.5))
    plan.extend(chunk(0))
    actions = plan.extend(chunk(2))
    assert actions[0].tolist() == [0, 2]  # the chunk of step 2 arrives at step 3
    weights = np.exp([0, -0.5]) / np.exp([0, -0.5]).sum()
    assert actions[1].tolist() == pytest.approx([2 * weights[1], 3])


def test_only_real_time_chunking_commits_and_only_to_what_is_left() -> None:
    for mode in ("chunk", "ensemble"):
        plan = Plan(Execution(mode, replan=2))  # type: ignore[arg-type]
        plan.extend(chunk(0))
        assert plan.committed() is None
    guidance = Guidance("linear", 3.0, False)
    plan = Plan(Execution("real_time", replan=2, delay=1, guidance=guidance))
    assert plan.committed() is None
    plan.extend(chunk(0))
    left = plan.committed()
    assert left is not None and left.guidance == guidance
    assert left.actions.tolist() == [[0, 2], [0, 3], [0, 4], [0, 5]] and (left.delay, left.end) == (1, 4)
    estimated = plan.committed(3)
    assert estimated is not None and estimated.delay == 3


def test_what_is_committed_is_what_will_be_executed_until_the_new_chunk_is_there() -> None:
    """Where chunks arrive later than the next one is asked for, the newest is not yet being executed."""
    plan = Plan(Execution("real_time", replan=1, delay=3))
    executed: list[list[float]] = []
    promised: dict[int, list[list[float]]] = {}
    for number in range(6):
        left = plan.committed()
        promised[plan.step] = [] if left is None else left.actions[: left.delay].tolist()
        executed += plan.extend(ActionChunk(np.full((6, 2), number, np.float32))).tolist()
    for step, actions in promised.items():
        assert actions[: len(executed) - step] == executed[step : step + len(actions)]


def test_a_plan_forgets_what_it_has_executed() -> None:
    for mode in ("chunk", "ensemble", "real_time"):
        plan = Plan(Execution(mode, replan=1, delay=2))  # type: ignore[arg-type]
        for _ in range(100):
            plan.extend(chunk(plan.step))
        assert len(plan._chunks) <= 6


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"replan": 0}, "replan must be a whole number from 1"),
        ({"delay": -1}, "delay must be a whole number from 0"),
        ({"decay": float("nan")}, "decay"),
        ({"guidance": Guidance(max_weight=0)}, "max_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        Execution(**changes)


# ---------------------------------------------------------------------------------------------------- limits


def test_limits_are_those_that_the_robot_declares() -> None:
    limits = Limits.of(ROBOT)
    assert limits.apply(np.float32([-2, 0.5, 3]), None).tolist() == [-1, 0.5, 1]
    inside = np.float32([-1, 0.25, 1])
    assert limits.apply(inside, None).tobytes() == inside.tobytes()


def test_a_step_that_is_too_far_is_shortened() -> None:
    limits = Limits.of(ROBOT, change=0.125)
    assert limits.apply(np.float32([1, -1, 0.5]), np.float32([0, 0, 0.5])).tolist() == [0.125, -0.125, 0.5]
    assert limits.apply(np.float32([1, -1, 0.5]), None).tolist() == [1, -1, 0.5]


NUMBERS = st.floats(-1e6, 1e6, width=32)


@given(NUMBERS, NUMBERS, st.floats(0, 1e3), NUMBERS, st.floats(0, 1e3))
@example(0.30000001192092896, 1.0, 0.05, -10.0, 1e3)
@example(0.0, 1.0, 0.05, -10.0, 1e3)
def test_no_rounding_carries_an_action_beyond_a_limit(
    before: float, action: float, change: float, low: float, width: float
) -> None:
    limits = Limits(np.array([low]), np.array([low + width]), np.array([change]))
    (first,) = limits.apply(np.float32([action]), None)
    sent = limits.apply(np.float32([action]), np.float32([before]))
    assert abs(Fraction(float(sent[0])) - Fraction(before)) <= Fraction(change)
    assert abs(sent - np.float32([before])) <= np.float32(change)
    narrow = np.float32([low, low + width])
    if narrow[0] < narrow[1]:  # else no float32 may lie between
        assert Fraction(low) <= Fraction(float(first)) <= Fraction(low + width)


def test_a_value_on_a_bound_that_float32_cannot_hold_is_not_outside_it() -> None:
    limits = Limits(np.array([-1.1]), np.array([1.1]), np.array([0.05]), on_violation="stop")
    for value in (1.1, -1.1):  # float32's nearest is beyond
        assert abs(float(limits.apply(np.float32([value]), None)[0])) <= 1.1
    assert float(limits.apply(np.float32([0.05]), np.zeros(1, np.float32))[0]) <= 0.05
    with pytest.raises(EmbodimentError, match="outside the limits"):
        limits.apply(np.float32([0.0501]), np.zeros(1, np.float32))


def test_from_outside_of_the_range_the_robot_returns_at_the_steps_limit() -> None:
    limits = Limits(np.zeros(1), np.ones(1), np.full(1, 0.25))
    for before, sent in ((3.0, 2.75), (-3.0, -2.75)):
        assert limits.apply(np.float32([0.5]), np.float32([before])).tolist() == [sent]


def test_stop_names_the_joint_the_value_and_what_is_permitted() -> None:
    limits = Limits.of(ROBOT, "stop", change=0.5)
    with pytest.raises(EmbodimentError, match=r"elbow 1\.5.* -0\.5 to 0\.5"):
        limits.apply(np.float32([0, 1.5, 0]), np.zeros(3, np.float32))


@pytest.mark.parametrize("on_violation", ["clip", "stop"])
def test_what_is_not_finite_always_stops(on_violation: str) -> None:
    with pytest.raises(EmbodimentError, match="not finite"):
        Limits.of(ROBOT, on_violation).apply(np.float32([0, np.nan, 0]), None)  # type: ignore[arg-type]


def test_a_robot_without_limits_is_not_called_safe() -> None:
    bare = dataclasses.replace(ROBOT, action=dataclasses.replace(ROBOT.action, low=(), high=()))
    with pytest.raises(EmbodimentError, match="declares no limits.*data card"):
        Limits.of(bare)
    with pytest.raises(EmbodimentError, match="declares no limits"):
        Limits.of(bare, change=float("inf"))
    short = dataclasses.replace(ROBOT, action=dataclasses.replace(ROBOT.action, low=(0.0,)))
    with pytest.raises(EmbodimentError, match=r"action\.low .*1 values.* 3"):
        Limits.of(short)


@pytest.mark.parametrize(
    ("low", "high", "change", "mode"),
    [
        ([0.0], [1.0], [float("nan")], "clip"),
        ([float("nan")], [1.0], [1.0], "clip"),
        ([0.0], [1.0], [-1.0], "clip"),
        ([1.0], [-1.0], [1.0], "clip"),
        ([0.0], [1.0], [0.1, 0.2], "clip"),
        ([0.0], [1.0], ["a"], "clip"),
        ([0.0], [1.0], ["1"], "clip"),
        ([0.0], [1.0], [True], "clip"),
        ([np.inf], [np.inf], [1.0], "clip"),
        ([-np.inf], [-np.inf], [1.0], "clip"),
        ([1e39], [1e40], [1.0], "clip"),
        ([-np.inf] * 2, [np.inf] * 2, [np.inf] * 2, "clip"),
        ([0.0], [1.0], [1.0], "Stop"),
    ],
)
def test_limits_that_would_let_anything_through_are_refused(low, high, change, mode):
    with pytest.raises(ConfigError, match="limits: "):
        Limits(low, high, change, on_violation=mode)


def test_limits_of_another_length_stop():
    with pytest.raises(EmbodimentError, match="2 limits"):
        Limits(np.zeros(2), np.ones(2), np.ones(2)).apply(np.zeros(3, np.float32), None)


@pytest.mark.parametrize(
    "wrong", [{"mode": "real-time"}, {"mode": "Ensemble"}, {"replan": 1.5}, {"replan": True}, {"delay": "1"}]
)
def test_an_execution_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ConfigError, match="execution: "):
        Execution(**wrong)
