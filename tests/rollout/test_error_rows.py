"""An episode whose environment failed is an error in every result, however its record came about."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient
from tests.rollout.test_checkpoint import save_checkpoint
from tests.rollout.toy_env import robot
from vlafit import cli
from vlafit.envs import EnvSpec
from vlafit.envs.messages import Reset
from vlafit.errors import ConfigError
from vlafit.rollout import Protocol, evaluate
from vlafit.rollout.earlier import read_earlier
from vlafit.rollout.env_pool import Advanced, Broken, EnvPool, EnvSlot
from vlafit.rollout.records import read_records

Make = Callable[..., Protocol]
DIES = """
name = "dies"
tasks = ["left", "die"]
trials = 2
first_seed = 100
horizon = 8
replan = 4

[env]
name = "tests.rollout.toy_env"
size = 16
"""


@pytest.mark.case(
    section="runs",
    report="an episode's `error` lowers the success rate",
    user_has="a line of episodes.jsonl with an error and `success` false",
    now="counted as an environment error; exit status 3, and `--retry-errors` plays it again",
)
@pytest.mark.parametrize(
    "change",
    [
        {"success": False, "error": "the simulator crashed"},
        {"success": True, "error": "the simulator crashed"},
        {"success": None, "error": None},
    ],
)
def test_a_row_with_an_error_never_counts_as_success_or_failure(
    protocol: Make, tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    left = protocol("left", trials=3)
    whole = evaluate(Obedient(), left, tmp_path, workers=1, videos=0)
    file = tmp_path / "episodes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").unlink()  # an evaluation that was interrupted after its last episode

    with caplog.at_level(logging.WARNING):
        got = evaluate(Obedient(), left, tmp_path, workers=1, videos=0)
    others = [row["success"] for i, row in enumerate(rows) if i != 1]
    assert (got.overall.errors, got.overall.episodes, got.overall.successes) == (1, 2, sum(others))
    assert any("INCOMPLETE: 1 of 3" in notice for notice in got.notices)
    assert json.loads((tmp_path / "result.json").read_text())["complete"] is False
    assert f"{file}, line 2: task left, seed {rows[1]['seed']}" in caplog.text
    assert read_earlier(tmp_path).outcomes["left", rows[1]["seed"]] is None

    again = evaluate(Obedient(), left, tmp_path, workers=1, videos=0, retry_errors=True)
    assert again.overall == whole.overall and not again.notices
    assert [(r.success, r.steps) for r in again.records] == [(r.success, r.steps) for r in whole.records]


def test_a_killed_environment_process_is_incomplete_with_status_3_until_it_is_played_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, file, out = (
        save_checkpoint(tmp_path / "policy", robot()),
        tmp_path / "dies.toml",
        tmp_path / "out",
    )
    file.write_text(DIES)
    words = ["eval", str(checkpoint), "--protocol", str(file), "--out", str(out), "--workers", "1"]
    words += ["--steps", "1", "--videos", "0"]
    for more in ([], ["--resume"], ["--retry-errors"]):
        assert cli.main([*words, *more]) == 3
        assert "INCOMPLETE: 1 of 4" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert (result["overall"]["errors"], result["overall"]["episodes"]) == (1, 3)
    rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert [(row["success"] is None, "SIGKILL" in (row["error"] or "")) for row in rows] == [
        (failed, failed) for failed in (False, False, False, True)
    ]


@pytest.mark.parametrize("caller", ["waits", "is busy"])
def test_an_answer_that_comes_after_the_time_limit_is_an_error_of_its_episode(caller: str) -> None:
    late = Reset(0, "late", 101, settle_steps=0, settle_action=(), start_steps=0, render=True, film=False)
    with EnvPool(EnvSpec("tests.rollout.toy_env", size=16), timeout_s=0.1) as pool:
        pool.describe()
        pool.fill(1, 1)
        pool.send(EnvSlot(0, 0), late)
        if caller == "is busy":
            pool._processes[0].link.poll(60)
        events = [event for _ in range(60) if pool.busy for event in pool.wait()]
    (event,) = events
    assert isinstance(event, Broken) and "within 0.1 s" in event.text
    assert ("was killed" in event.text) == (caller == "waits")


def test_an_answer_within_the_time_limit_counts() -> None:
    late = Reset(0, "late", 101, settle_steps=0, settle_action=(), start_steps=0, render=True, film=False)
    with EnvPool(EnvSpec("tests.rollout.toy_env", size=16), timeout_s=60) as pool:
        pool.describe()
        pool.fill(1, 1)
        pool.send(EnvSlot(0, 0), late)
        (event,) = [event for _ in range(60) if pool.busy for event in pool.wait()]
    assert isinstance(event, Advanced)


@pytest.mark.parametrize("invalid", [-3, 3])
def test_more_invalid_answers_than_answers_are_refused(tmp_path: Path, invalid: int) -> None:
    row = {"task": "left", "trial": 0, "seed": 100, "instruction": "left", "success": True, "steps": 4,
           "replans": 2, "wall_s": 0.1, "invalid_answers": invalid}  # fmt: skip
    path = tmp_path / "episodes.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rf"line 1: .* invalid_answers is {invalid} of 2 answers"):
        read_records(path, None)
    path.write_text(json.dumps(row | {"invalid_answers": 2}) + "\n")
    assert [record.invalid_answers for record in read_records(path, None)] == [2]
