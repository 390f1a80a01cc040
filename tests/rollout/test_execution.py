"""Rollouts execute chunks as they are told, and an evaluation of another execution is another evaluation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.rollout import Protocol, evaluate

Make = Callable[..., Protocol]


def test_every_way_of_execution_plays_to_the_end(protocol: Make, tmp_path: Path) -> None:
    successes = {}
    for name, execution in {
        "chunk": None,
        "late": Execution(replan=4, delay=3),
        "ensemble": Execution("ensemble", replan=1),
    }.items():
        result = evaluate(
            Obedient(), protocol(trials=3), tmp_path / name, workers=1, videos=0, execution=execution
        )
        successes[name] = [record.success for record in result.records]
        assert [record.seed % 3 != 0 for record in result.records] == successes[name]
    steps = json.loads((tmp_path / "ensemble" / "result.json").read_text())
    assert steps["execution"]["mode"] == "ensemble"
    assert "execution" not in json.loads((tmp_path / "chunk" / "result.json").read_text())


def test_the_protocols_own_execution_is_the_same_evaluation(protocol: Make, tmp_path: Path) -> None:
    for execution in (None, Execution(replan=4)):  # the second resumes the first
        evaluate(Obedient(), protocol(trials=1), tmp_path, workers=1, videos=0, execution=execution)
    with pytest.raises(ConfigError, match=r"(?s)another evaluation.*execution"):
        evaluate(Obedient(), protocol(trials=1), tmp_path, workers=1, videos=0, execution=Execution(replan=2))


def test_a_folder_of_another_execution_is_not_resumed_without_it(protocol: Make, tmp_path: Path) -> None:
    late = Execution(replan=4, delay=2)
    evaluate(Obedient(), protocol(trials=1), tmp_path, workers=1, videos=0, execution=late)
    with pytest.raises(ConfigError, match=r"(?s)another evaluation.*execution"):
        evaluate(Obedient(), protocol(trials=1), tmp_path, workers=1, videos=0)


def test_an_actor_that_cannot_continue_a_chunk_is_refused_before_anything_is_played(
    protocol: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Obedient cannot continue a chunk"):
        evaluate(Obedient(), protocol(), tmp_path / "eval", execution=Execution("real_time", replan=4))
    assert not (tmp_path / "eval").exists()


def test_chunks_that_end_before_the_next_one_is_there_are_refused_before_anything_is_played(
    protocol: Make, tmp_path: Path
) -> None:
    too_late = Execution(replan=6, delay=3)  # of chunks of 8 steps
    with pytest.raises(ConfigError, match=r"8 steps, and 6 \(replan\) \+ 3 \(delay\) .* at most 5 steps"):
        evaluate(Obedient(), protocol(), tmp_path / "eval", execution=too_late)
    assert not (tmp_path / "eval").exists()
