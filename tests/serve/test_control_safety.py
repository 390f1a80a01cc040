"""The control loop after errors, with reused buffers and with answers that no robot may be sent."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as dial

from tests.serve.robots import CHUNK, Continuing, Summing, seen
from vlafit.errors import EmbodimentError, RemoteError, VlafitError
from vlafit.execution import Execution, Limits
from vlafit.serve import protocols, wire
from vlafit.serve.client import connect
from vlafit.serve.control import Controller
from vlafit.serve.server import Running
from vlafit.types import ActionChunk, Committed, EpisodeKey, Guidance, Observation

Serve = Callable[..., Running]
WORDS = seen().instruction


class Noting(Summing):
    """Answers the n-th request with chunks of n, and notes what it saw; those in `broken` go wrong."""

    def __init__(self, broken: Sequence[int] = (), invalid: Sequence[int] = (), history: int = 1) -> None:
        super().__init__()
        self.broken, self.invalid, self.history = broken, invalid, history
        self.seen: list[list[float]] = []

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        assert self.open.wait(30)
        count = len(self.seen)
        newest = observations[0]
        self.seen.append([float(one.state[0]) for one in (*newest.past, newest)])
        if count in self.broken:
            raise RemoteError("no answer")
        return [ActionChunk(np.full((CHUNK, 3), count, np.float32), count not in self.invalid)]


def step(control: Controller, state: float) -> float | None:
    """Return the first value of the action; None where the step raises."""
    try:
        action = control.step(seen().images, [state, 0, 0])
    except VlafitError:
        return None
    if control._pending is not None:
        control._pending.exception(timeout=30)
    return float(action[0])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("fault", ["broken", "invalid"])
def test_after_an_error_the_next_step_asks_again(fault: str, background: bool) -> None:
    actor = Noting(**{fault: (1,)})
    with Controller(actor, Execution(replan=2), background=background, on_invalid="stop") as control:
        control.start(WORDS)
        got = [step(control, i) for i in range(6)]
        stopped = got.index(None)
        # asked at steps 0 and 2; the latter fails, and the step after the error asks
        assert [states[-1] for states in actor.seen[:3]] == [0, 2, stopped + 1]
        assert 2 in got[stopped + 1 : stopped + 3]


def test_a_step_that_raised_is_in_the_history_once() -> None:
    actor = Noting(broken=(1,), history=3)
    with Controller(actor, Execution(replan=1)) as control:
        control.start(WORDS)
        assert [step(control, i) for i in (0, 1, 1, 2)] == [0, None, 2, 3]
    assert actor.seen == [[0], [0, 1], [0, 1], [0, 1, 2]]


def test_a_robot_may_reuse_its_buffers() -> None:
    actor = Noting(history=3)
    images = {name: image.copy() for name, image in seen().images.items()}
    state = np.zeros(3, np.float32)
    with Controller(actor, Execution(replan=1)) as control:
        control.start(WORDS)
        for i in range(3):
            state[:] = i
            for image in images.values():
                image[:] = i
            control.step(images, state)
        assert [int(one.images["front"][0, 0, 0]) for one in control._newest] == [0, 1, 2]
    assert actor.seen[-1] == [0, 1, 2]


@pytest.mark.parametrize("limited", [False, True])
def test_an_action_that_is_changed_in_place_changes_nothing_here(limited: bool) -> None:
    limits = Limits(np.full(3, -9.0), np.full(3, 9.0), np.full(3, 0.25)) if limited else None
    answers = []
    for factor in (1, 57):
        with Controller(Summing(), Execution("ensemble", replan=1), limits=limits) as control:
            control.start(WORDS)
            answers.append([])
            for i in range(4):
                action = control.step(seen(i).images, seen(i).state)
                answers[-1].append(action.tobytes())
                action *= factor
    assert answers[0] == answers[1]


class Answering(Summing):
    """Answers every request with the same actions, whatever they are."""

    def __init__(self, actions: Any) -> None:
        super().__init__()
        self.actions = actions

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        return [ActionChunk(self.actions) for _ in keys]


ZEROS = np.zeros((CHUNK, 3), np.float32)
NO_ACTIONS: dict[str, tuple[Any, str]] = {
    "NaN": (ZEROS * np.nan, "not finite"),
    "a double beyond float32": (np.full((CHUNK, 3), 1e300), "beyond float32"),
    "complex": (ZEROS.astype(complex), "must be numbers, not complex128"),
    "booleans": (ZEROS.astype(bool), "must be numbers, not bool"),
    "words": (ZEROS.astype(str), "must be numbers"),
    "objects": (ZEROS.astype(object), "must be numbers, not object"),
    "None": (None, "must be numbers, not None"),
    "lists of unequal lengths": ([[0.0] * 3, [0.0] * 2], "must be numbers.*unequal"),
    "another robot's": (np.zeros((CHUNK, 4)), r"shape \(6, 4\); a chunk is \[steps, 3\]"),
    "one step": (np.zeros(3), r"shape \(3,\)"),
    "no step": (np.zeros((0, 3)), r"shape \(0, 3\)"),
}


@pytest.mark.parametrize("name", NO_ACTIONS)
def test_without_limits_too_no_action_is_sent_that_is_none(name: str) -> None:
    actions, says = NO_ACTIONS[name]
    with Controller(Answering(actions)) as control:
        control.start(WORDS)
        with pytest.raises(EmbodimentError, match=f"stopped: .*{says}"):
            control.step(seen().images, seen().state)


@pytest.mark.parametrize("name", NO_ACTIONS)
def test_no_client_is_sent_what_is_no_action(serve: Serve, name: str) -> None:
    actions, says = NO_ACTIONS[name]
    running = serve(Answering(actions), execution=Execution(replan=2))
    with connect(running.address) as remote, pytest.raises(RemoteError, match=says):
        remote.act([seen()], [EpisodeKey(0, WORDS, 0)])
    with dial(running.address, proxy=None) as client:
        client.recv(timeout=10)
        client.send(wire.pack({"images": dict(seen().images), "state": seen().state, "prompt": WORDS}))
        assert re.search(says, str(client.recv(timeout=10)))


FRAMED = [name for name, (a, _) in NO_ACTIONS.items() if isinstance(a, np.ndarray) and a.dtype.kind in "bf"]


@pytest.mark.parametrize("name", FRAMED)
def test_a_client_refuses_what_is_no_action_whatever_server_sends_it(name: str) -> None:
    actions, says = NO_ACTIONS[name]
    with pytest.raises(wire.WireError, match=says):
        protocols.read_chunks({"chunks": [actions]}, 1, 3)


@pytest.mark.parametrize("answer", [[], None, [ZEROS], [None], [ActionChunk(ZEROS)] * 2])
def test_an_actor_that_answers_with_no_chunk_is_named(answer: Any) -> None:
    class Wrong(Summing):
        def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
            return answer

    with Controller(Wrong()) as control:
        control.start(WORDS)
        with pytest.raises(EmbodimentError, match="stopped: Wrong.act must return one ActionChunk"):
            control.step(seen().images, seen().state)


@pytest.mark.parametrize("actions", [ZEROS.tolist(), ZEROS.astype(int), ZEROS.astype(np.float16)])
def test_numbers_of_any_kind_are_actions(actions: Any) -> None:
    with Controller(Answering(actions)) as control:
        control.start(WORDS)
        assert control.step(seen().images, seen().state).tobytes() == ZEROS[0].tobytes()


@pytest.mark.parametrize("control_name", ["joint_position", "absolute_position"])
def test_the_limit_of_a_step_counts_across_episodes(control_name: str) -> None:
    actor = Noting()
    actor.embodiment = dataclasses.replace(Summing.embodiment, control=control_name)
    limits = Limits(np.full(3, -9.0), np.full(3, 9.0), np.full(3, 0.25))
    with Controller(actor, Execution(replan=1), limits=limits) as control:
        got = []
        for _ in range(2):
            control.start(WORDS)
            got.append([step(control, -5) for _ in range(2)])
    # the requests ask for 0, 1, 2 and 3; the joints are at -5
    from_state = [[-4.75, -4.5], [-4.75, -4.5]]
    assert got == (from_state if control_name == "joint_position" else [[0, 0.25], [0.5, 0.75]])


class Refused(Continuing):
    """Answers the n-th request with chunks of n / 10, but for one step of the request `bad`; notes what it
    saw."""

    def __init__(self, bad: int, at: int) -> None:
        super().__init__()
        self.bad, self.at = bad, at
        self.asked_at: list[float] = []
        self.went_on: list[int] = []

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        actions = np.full((CHUNK, 3), len(self.asked_at) / 10, np.float32)
        if len(self.asked_at) == self.bad:
            actions[self.at] = 90
        self.asked_at.append(float(observations[0].state[0]))
        return [ActionChunk(actions)]

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        self.went_on.append(len(self.asked_at))
        return self.act(observations, keys)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "execution", [Execution("chunk", 2), Execution("ensemble", 2), Execution("real_time", 2)]
)
def test_a_stop_by_the_limits_drops_the_plan_and_all_that_was_asked_from_it(
    execution: Execution, background: bool
) -> None:
    # the first chunk is refused at its third step, at which another may have been asked for
    actor = Refused(bad=0, at=2)
    limits = Limits(np.full(3, -1.0), np.full(3, 1.0), np.full(3, np.inf), on_violation="stop")
    if not background:  # there, the second chunk would begin at that step
        execution = dataclasses.replace(execution, replan=4)
    with Controller(actor, execution, limits=limits, background=background) as control:
        control.start(WORDS)
        got = [step(control, i) for i in range(5)]
    # the step after the stop asks anew, with what is seen then, and continues nothing
    fresh = actor.asked_at.index(3)
    assert got == [0, 0, None, np.float32(fresh / 10), np.float32(fresh / 10)]
    assert fresh not in actor.went_on and fresh == len(actor.asked_at) - 1


class Timed(Continuing):
    """Takes the time of a clock for each answer, and notes for what delay it was asked."""

    def __init__(self, clock: list[float], takes: float) -> None:
        super().__init__()
        self.clock, self.takes = clock, takes
        self.delays: list[int] = []

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.clock[0] += self.takes
        return super().act(observations, keys)

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        self.delays += [left.delay for left in committed if left is not None]
        return super().act_guided(observations, keys, committed)


@pytest.mark.parametrize(
    ("takes", "execution", "delay"),
    [
        (0.35, Execution("real_time", 2), 4),
        (0.01, Execution("real_time", 2), 1),
        (9.0, Execution("real_time", 2), CHUNK - 2),  # no longer than what is left
        (0.35, Execution("real_time", 2, 3), 3),  # as the user says
        (0.35, Execution("real_time", 2, guidance=Guidance(prefix="clean")), 0),
    ],
)
def test_the_first_hand_over_is_expected_after_what_an_answer_that_continues_a_chunk_took(
    monkeypatch: pytest.MonkeyPatch, takes: float, execution: Execution, delay: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr("vlafit.serve.control.monotonic", lambda: clock[0])
    actor = Timed(clock, takes)
    with Controller(actor, execution, background=True) as control:
        control.start(WORDS)
        for i in range(3):
            step(control, i)
            clock[0] += 0.1
    prepared = [execution.delay or 1] * 2 if delay else []  # before the robot moved
    assert actor.delays == [*prepared, delay]


def test_what_the_first_answer_that_continues_a_chunk_needs_is_done_before_the_robot_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("vlafit.serve.control.monotonic", lambda: clock[0])

    class Cold(Timed):
        def act_guided(
            self,
            observations: Sequence[Observation],
            keys: Sequence[EpisodeKey],
            committed: Sequence[Committed | None],
        ) -> list[ActionChunk]:
            self.clock[0] += 0 if self.delays else 30.0
            return super().act_guided(observations, keys, committed)

    actor = Cold(clock, 0.15)
    with Controller(actor, Execution("real_time", 2), background=True) as control:
        control.start(WORDS)
        for i in range(3):
            step(control, i)
            clock[0] += 0.1
        assert actor.delays == [1, 1, 2]
        control.start(WORDS)  # the policy is prepared once
        step(control, 0)
    assert actor.delays == [1, 1, 2]
