"""LIBERO behind an evaluation: a crash, a hang and an interruption cost what they must and nothing else."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="needs the extra libero (pip install 'vlafit[libero]')")

from tests.rollout.faulty_libero import DIES, HANGS, RAISES
from vlafit.errors import SimulationError
from vlafit.rollout import Protocol, evaluate, load_protocol, robot_of
from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Observation

pytestmark = [pytest.mark.sim, pytest.mark.slow]


class Drifting:
    """Moves the hand by the episode's noise; one observation at a time, so that one environment is made."""

    width = 1
    identity = "drifting"

    def __init__(self, embodiment: Embodiment, calls: int = 0) -> None:
        self.embodiment, self.seeds, self.calls = embodiment, {}, calls

    def fingerprint(self) -> str:
        return self.identity

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        assert all(set(seen.images) == {"agentview", "wrist"} for seen in observations)
        return [self._act(key) for key in keys]

    def _act(self, key: EpisodeKey) -> ActionChunk:
        rng = np.random.default_rng([key.seed, key.replan])
        return ActionChunk(rng.uniform(-1, 1, (3, 7)).astype(np.float32))


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    """The shipped one, with one task, short episodes and small pictures."""
    shipped = load_protocol("libero-object-openpi")
    return replace(
        shipped, tasks=shipped.tasks[:1], trials=2, horizon=6, replan=3,
        env=replace(shipped.env, size=32), timeout_s=90.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def robot(protocol: Protocol) -> Embodiment:
    try:
        return robot_of(protocol)
    except SimulationError as error:
        if "apt-get install" not in str(error):
            raise
        pytest.skip("no EGL here")


def test_what_breaks_is_an_error_of_its_episode_and_the_others_are_played(
    protocol: Protocol, robot: Embodiment, tmp_path: Path
) -> None:
    faulty = replace(protocol, trials=5, env=replace(protocol.env, name="tests.rollout.faulty_libero"))
    got = evaluate(Drifting(robot), faulty, tmp_path, workers=1, videos=0)
    errors = {record.seed: record.error or "" for record in got.records if record.error}
    assert set(errors) == {RAISES, DIES, HANGS}
    assert "the simulation is unstable" in errors[RAISES]
    assert "SIGSEGV" in errors[DIES] and "did not answer within 90 s" in errors[HANGS]
    assert {record.seed for record in got.records if record.success is False} == {0, 4}


def test_the_wrong_instruction_of_a_libero_pro_task_is_that_of_the_known_one(
    robot: Embodiment, tmp_path: Path
) -> None:
    shipped = load_protocol("libero-object-task-openpi")
    task = shipped.tasks[0]
    short = replace(
        shipped, tasks=(task,), swapped={task: shipped.swapped[task]}, trials=1, horizon=3, replan=3,
        env=replace(shipped.env, size=32), timeout_s=90.0,
    )  # fmt: skip
    got = evaluate(Drifting(robot), short, tmp_path, workers=1, videos=0, wrong_instruction=True)
    (record,) = got.records
    assert record.error is None and record.success is False
    assert record.instruction == "pick up the alphabet soup and place it in the basket"


def test_interrupted_and_resumed_equals_uninterrupted(
    protocol: Protocol, robot: Embodiment, tmp_path: Path
) -> None:
    def episodes(folder: str) -> list[dict]:
        lines = (tmp_path / folder / "episodes.jsonl").read_text().splitlines()
        return [{**json.loads(line), "wall_s": 0} for line in lines]

    evaluate(Drifting(robot), protocol, tmp_path / "whole", workers=1, videos=0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Drifting(robot, calls=4), protocol, tmp_path / "stopped", workers=1, videos=0)
    assert len(episodes("stopped")) == 1
    evaluate(Drifting(robot), protocol, tmp_path / "stopped", workers=1, videos=0, resume=True)
    assert episodes("stopped") == episodes("whole") and len(episodes("whole")) == 2
