"""A policy with one camera that is missing: refused in one sentence, and never said to act without it."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.test_checkpoint import save_checkpoint
from tests.rollout.toy_env import robot
from vlafit.actor import PolicyActor, load_actor
from vlafit.errors import CodecError, RemoteError
from vlafit.execution import Execution
from vlafit.serve.client import connect
from vlafit.serve.control import Controller
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.types import EpisodeKey, Feature, Observation

STATE, WORDS = np.zeros(2, np.float32), "go to the left"


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> PolicyActor:
    """Its only camera is called front, and its chunk has 8 steps."""
    return load_actor(save_checkpoint(tmp_path_factory.mktemp("policy"), robot()), steps=1, width=1)


def test_it_is_refused_and_not_said_to_act(actor: PolicyActor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with Controller(actor) as control:
            control.start(WORDS)
            with pytest.raises(CodecError, match=r"no image of any of the policy's cameras \(front\)"):
                control.step({"front": None}, STATE)
        with (
            serving(actor, describe(actor), Options(port=0)) as running,
            connect(running.address) as remote,
            pytest.raises(RemoteError, match="no image of any of the policy's cameras"),
        ):
            remote.act([Observation({}, STATE, WORDS)], [EpisodeKey(0, "left", 0)])
    assert "acts without it" not in caplog.text


def test_a_camera_that_the_policy_does_not_read_may_be_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = replace(robot(), cameras=(*robot().cameras, Feature("wrist", (16, 16, 3))))
    local = load_actor(save_checkpoint(tmp_path / "policy", two), steps=1)  # its codec has a slot for front
    front = np.full(two.cameras[0].shape, 9, np.uint8)
    sent = []
    with (
        serving(local, describe(local), Options(port=0)) as running,
        connect(running.address) as remote,
        caplog.at_level(logging.WARNING),
    ):
        for actor in (local, remote):
            assert actor.expected.cameras == ("front",)
            for more in ({}, {"wrist": None}, {"wrist": front}):
                with Controller(actor) as control:
                    control.start(WORDS)
                    sent.append(control.step({"front": front, **more}, STATE).tobytes())
    assert len(set(sent)) == 1 and "camera" not in caplog.text


@pytest.mark.case(
    section="runs",
    report="`replan = 16` executes 8 steps",
    user_has="`Execution.replan`, `--replan` or a protocol's `replan` above the policy's chunk",
    now="a warning, and a line of the agreement, with the steps after which it is asked again",
)
def test_a_replan_interval_above_the_chunk_is_said(
    actor: PolicyActor, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = actor.chunk
    said = f"a chunk has {chunk} steps, so the policy is asked again after {chunk}, not after replan = 99"
    with caplog.at_level(logging.WARNING):
        Controller(actor, Execution(replan=chunk)).close()
        assert not caplog.text
        Controller(actor, Execution(replan=99)).close()
        assert caplog.text.count(said) == 1
        caplog.clear()
        options = Options(port=0, execution=Execution(replan=99))
        with serving(actor, describe(actor), options) as running, connect(running.address) as remote:
            assert remote.chunk == chunk and caplog.text.count(said) == 1
            Controller(remote, Execution(replan=99)).close()
    assert caplog.text.count(said) == 2
