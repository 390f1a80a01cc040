"""The control loop: one action a step, whether the policy is fast, slow, remote or broken."""

import logging
from collections.abc import Callable

import numpy as np
import pytest

from tests.serve.robots import CHUNK, Continuing, Summing, seen
from vlafit.errors import ConfigError, EmbodimentError, RemoteError
from vlafit.execution import Execution, Limits
from vlafit.serve.client import connect
from vlafit.serve.control import Controller
from vlafit.serve.server import Running
from vlafit.types import EpisodeKey

Serve = Callable[..., Running]
WORDS = seen().instruction


def steps(control: Controller, count: int, first: int = 0) -> list[bytes]:
    return [control.step(seen(i).images, seen(i).state).tobytes() for i in range(first, first + count)]


def test_each_chunk_is_executed_up_to_the_interval_and_keyed_by_episode_and_replan() -> None:
    with Controller(Summing(), Execution(replan=2)) as control:
        for episode in range(2):
            control.start(WORDS)
            got = steps(control, 6)
            for i in range(0, 6, 2):
                (chunk,) = Summing().act([seen(i)], [EpisodeKey(episode, WORDS, i // 2)])
                assert got[i : i + 2] == [action.tobytes() for action in chunk.actions[:2]]


def test_a_remote_policy_drives_the_robot_as_a_local_one(serve: Serve) -> None:
    with connect(serve(Continuing()).address) as remote:
        for execution in (Execution(replan=3), Execution("ensemble", replan=1), Execution("real_time", 2, 1)):
            answers = []
            for actor in (remote, Continuing()):
                with Controller(actor, execution) as control:
                    control.start(WORDS, seed=7)
                    answers.append(steps(control, 8))
            assert answers[0] == answers[1]


def test_lists_are_taken_and_what_is_no_observation_is_named() -> None:
    with Controller(Summing()) as control:
        with pytest.raises(ConfigError, match="call start first"):
            steps(control, 1)
        control.start(WORDS)
        one = control.step(
            {name: image.tolist() for name, image in seen().images.items()}, list(seen().state)
        )
        assert one.tobytes() == Summing().act([seen()], [EpisodeKey(0, WORDS, 0)])[0].actions[0].tobytes()
        with pytest.raises(EmbodimentError, match="not finite in dimension elbow"):
            control.step(seen().images, [0, np.nan, 0])


def test_a_camera_that_is_missing_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with Controller(Summing(), Execution(replan=1)) as control, caplog.at_level(logging.WARNING):
        control.start(WORDS)
        for _ in range(5):
            control.step({"front": seen().images["front"]}, seen().state)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["camera 'wrist' is missing"]


def test_in_the_background_the_old_chunk_goes_on_until_the_new_one_is_there() -> None:
    actor = Continuing(width=1)
    with Controller(actor, Execution("real_time", replan=2), background=True) as control:
        control.start(WORDS)
        first = steps(control, 2)
        old = Summing().act([seen(0)], [EpisodeKey(0, WORDS, 0)])[0].actions
        assert first == [action.tobytes() for action in old[:2]] and control.waits == 0
        actor.open.clear()  # from now on the policy thinks
        assert steps(control, 3, first=2) == [action.tobytes() for action in old[2:5]]
        actor.open.set()
        assert control._pending is not None
        control._pending.result(timeout=30)
        new = Summing().act([seen(2)], [EpisodeKey(0, WORDS, 1)])[0].actions
        assert steps(control, 1, first=5) != [old[5].tobytes()]
        assert control._delays[-1] == 3 and control.waits == 0  # three steps passed; the chunk begins there
        assert new.shape == (CHUNK, 3)


def test_a_policy_slower_than_its_chunks_makes_the_robot_wait_and_says_so() -> None:
    actor = Summing(width=1)
    with Controller(actor, Execution(replan=CHUNK), background=True) as control:
        control.start(WORDS)
        got = steps(control, CHUNK + 1)
    assert len(got) == CHUNK + 1 and control.waits == 1


def test_an_error_of_the_policy_is_raised_once_and_the_next_step_asks_again(serve: Serve) -> None:
    with connect(serve().address) as remote, Controller(remote) as control:
        control.start("fail")
        with pytest.raises(RemoteError, match="the policy failed"):
            steps(control, 1)
        control.start(WORDS)
        assert len(steps(control, 2)) == 2


def test_a_new_episode_takes_nothing_from_the_one_before() -> None:
    actor = Summing(width=1)
    with Controller(actor, Execution(replan=1), background=True) as control:
        control.start(WORDS)
        steps(control, 3)
        control.start(WORDS, seed=9)
        (action,) = steps(control, 1)
    assert action == Summing().act([seen(0)], [EpisodeKey(9, WORDS, 0)])[0].actions[0].tobytes()


def test_actions_stay_within_the_limits_of_the_robot() -> None:
    with Controller(Summing(), limits=Limits.of(Summing.embodiment, change=0.25)) as control:
        control.start(WORDS)
        actions = [control.step(seen(i).images, seen(i).state) for i in range(12)]
    assert (np.abs(np.diff(actions, axis=0)) <= 0.25).all()
    assert (np.array(actions) >= [-1, -1, 0]).all() and (np.array(actions) <= 1).all()
    with Controller(Summing(), limits=Limits.of(Summing.embodiment, "stop", change=0.25)) as control:
        control.start(WORDS)
        with pytest.raises(EmbodimentError, match="stopped"):
            steps(control, 12)


def test_an_actor_that_cannot_act_so_is_refused() -> None:
    class Bare:
        def act(self, observations, keys):
            return []

    with pytest.raises(ConfigError, match="Bare .*which robot"):
        Controller(Bare())
    with pytest.raises(ConfigError, match="Summing cannot continue a chunk"):
        Controller(Summing(), Execution("real_time"))
