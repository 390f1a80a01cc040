"""A faulty environment costs own episodes, which can be played again; a broken renderer is found first."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient, Trained
from tests.rollout.toy_env import robot
from vlafit import locks
from vlafit.envs import EnvSpec
from vlafit.envs.messages import Ready
from vlafit.errors import ConfigError, SimulationError, VlafitError
from vlafit.rollout import Protocol, Shard, evaluate, memory, policy_width, preflight

Make = Callable[..., Protocol]
FAULTS = {
    "nan": "state: not finite",
    "short": r"state: has shape (1,), the robot's is (2,)",
    "text": "state: must be float32 [2], is <U1",
    "float": "camera 'front': must be uint8, is float32",
    "blind": "camera 'front': its image is missing",
    "maybe": "the environment reports success = 'no', which is not a bool",
}
GB = 2**30


def test_what_an_environment_must_not_report_is_an_error_of_its_episode_that_names_task_and_seed(
    protocol: Make, tmp_path: Path
) -> None:
    many = protocol("left", *FAULTS, trials=2)  # seeds 100, and 101 where the environment is faulty
    got = evaluate(Obedient(), many, tmp_path, workers=1, videos=0)
    errors = {(r.task, r.seed): r.error or "" for r in got.records if r.error}
    assert set(errors) == {(task, 101) for task in FAULTS}
    for task, fact in FAULTS.items():
        assert f"task {task!r}, seed 101" in errors[task, 101] and fact in errors[task, 101]
    assert not any(r.success for r in got.records if r.error)
    assert (
        got.overall.episodes == 8 and got.tasks["left"].successes == 2
    )  # the others were played to their end


def test_a_renderer_that_cannot_draw_is_found_before_the_first_episode(
    protocol: Make, tmp_path: Path
) -> None:
    blind = protocol(env=EnvSpec("tests.rollout.toy_env", size=16, renderer="osmesa"))
    facts = "cannot show the start of task 'right', seed 103: renderer 'osmesa' does not work here"
    with pytest.raises(SimulationError, match=facts):
        evaluate(Obedient(), blind, tmp_path / "eval", workers=1, videos=0)
    assert not (tmp_path / "eval").exists(), "what failed before its first episode leaves no folder"
    with pytest.raises(SimulationError, match="renderer 'osmesa' does not work here"):
        preflight(blind, robot(renderer="osmesa"))


@pytest.mark.case(
    section="runs",
    report="episodes of two evaluations in one folder",
    user_has="`vlafit eval --resume` while the first still plays",
    now="refused, naming the folder and the process",
)
def test_an_evaluation_is_played_by_one_command_at_a_time(protocol: Make, tmp_path: Path) -> None:
    with locks.exclusive(tmp_path / "out", "vlafit eval"), pytest.raises(VlafitError) as caught:
        evaluate(Obedient(), protocol("left", trials=1), tmp_path / "out", workers=1, videos=0)
    assert all(fact in str(caught.value) for fact in (str(tmp_path / "out"), f"process {os.getpid()}"))


def test_a_broken_first_start_is_only_an_error_of_its_episode(protocol: Make, tmp_path: Path) -> None:
    odd = protocol("die-in-reset", first_seed=101, trials=2)
    got = evaluate(Obedient(), odd, tmp_path, workers=1, videos=0)
    assert {r.seed: r.error is None for r in got.records} == {101: False, 102: True}


@pytest.mark.parametrize("first", [101, 200])
def test_starts_that_a_task_lacks_are_one_error_before_the_first_episode(
    protocol: Make, tmp_path: Path, first: int
) -> None:
    many = protocol("left", "few", first_seed=first, trials=4)
    facts = rf"protocol 'toy': task 'few': there is no start {max(103, first)}; set at most 103"
    actor = Obedient()
    for shard in (None, Shard(1, 4)):
        with pytest.raises(ConfigError, match=facts):
            evaluate(actor, many, tmp_path / "eval", workers=1, videos=0, shard=shard)
    assert not actor.heard and not (tmp_path / "eval").exists()
    with pytest.raises(ConfigError, match=facts):
        preflight(many, robot())
    with pytest.raises(ConfigError, match=r"few.*no start 103"):
        preflight(protocol("few", trials=2), robot(), trials=5)
    preflight(protocol("few", trials=3), robot())


class Mended(Obedient):
    """Succeeds within two steps, before the environment breaks."""

    def _act(self, observation, key):  # type: ignore[no-untyped-def]
        chunk = super()._act(observation, key)
        chunk.actions[:] = -8.0
        return chunk


def test_errors_can_be_played_again_and_nothing_else_is(
    protocol: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raising = protocol("raise", trials=2)
    first = evaluate(Obedient(), raising, tmp_path, workers=1, videos=0)
    assert first.overall.errors == 1
    actor = Mended()
    actor.__class__.__name__ = "Obedient"  # the folder knows an untrained actor by its class
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = evaluate(actor, raising, tmp_path, workers=1, videos=0, retry_errors=True)
    assert again.overall.errors == 0 and not again.notices and not caplog.text
    assert again.records[0] == first.records[0] and again.records[1].success is True
    assert json.loads((tmp_path / "result.json").read_text())["complete"] is True
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 2  # the attempt that failed is not kept beside the one that counts


@pytest.mark.slow
def test_the_time_limit_belongs_to_the_protocol_and_decides_no_result(protocol: Make, tmp_path: Path) -> None:
    hanging = protocol("left", "hang", trials=2, timeout_s=3.0)
    got = evaluate(Obedient(), hanging, tmp_path, workers=1, videos=0)
    assert "did not answer within 3 s" in str(next(r.error for r in got.records if r.error))
    assert hanging.sha256() == replace(hanging, timeout_s=60.0).sha256()
    with pytest.raises(ConfigError, match=r"timeout_s: .*positive.* 0\.0"):
        protocol(timeout_s=0.0)


def test_the_width_of_batches_is_chosen_from_the_episodes_and_kept(protocol: Make, tmp_path: Path) -> None:
    assert policy_width(protocol(), tmp_path) == 8 and policy_width(protocol(trials=50), tmp_path) == 16
    assert policy_width(protocol(), tmp_path, trials=1) == 2
    few = protocol(trials=1)
    actor = Trained()  # of width 4
    evaluate(actor, few, tmp_path, workers=1, videos=0)
    assert policy_width(few, tmp_path) == 4  # what the folder was begun with
    header = json.loads((tmp_path / "evaluation.json").read_text())["identity"]
    assert header["protocol_sha256"] == replace(few, width=4).sha256() != few.sha256()
    assert few.sha256() == replace(few, width=16).sha256()  # what all evaluations took before
    del header["protocol"]["width"]
    header["protocol_sha256"] = few.sha256()
    (tmp_path / "evaluation.json").write_text(json.dumps({"identity": header, "environment": {}}))
    assert policy_width(few, tmp_path) == 16  # an evaluation of an earlier version


@pytest.mark.parametrize(
    ("free", "workers", "expected"),
    [
        (64 * GB, 0, (8, 2)),  # everything fits
        (64 * GB, 3, (3, 6)),
        (14 * GB, 0, (8, 1)),  # fewer environments in each process
        (4 * GB, 0, (2, 1)),  # and fewer processes
        (0, 0, (1, 1)),
        (0, 5, (5, 1)),  # who asks for processes gets them
    ],
)
def test_workers_are_as_many_as_the_memory_holds(free: int, workers: int, expected: tuple[int, int]) -> None:
    ready = Ready(robot(), {}, {}, program_bytes=GB, env_bytes=GB // 2, shares_process=True)
    assert memory.places(ready, workers, cores=8, wanted=16, free=free) == expected
