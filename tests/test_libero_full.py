"""Every official initial state of LIBERO: what the command plays, what it keeps, what its tables say."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.eval_scripts import EVAL, script
from vlafit import shipped
from vlafit.rollout import load_protocol

SHIPPED = shipped.find("checkpoint", "libero-object-base")
SHORT = f"""
base = "{EVAL / "metaworld-faucet.toml"}"
name = "short"
horizon = 8
replan = 8
"""


@pytest.fixture
def full() -> ModuleType:
    return script("libero_full")


def finished(folder: Path) -> None:
    """Put the evaluation that ships with the checkpoint where a finished one would be."""
    folder.mkdir(parents=True)
    shutil.copy(SHIPPED / "success.json", folder / "result.json")
    shutil.copy(SHIPPED / "episodes.jsonl", folder / "episodes.jsonl")


def test_what_it_plays_is_there_and_each_wrong_sentence_has_a_partner(full: ModuleType) -> None:
    for evaluation in full.EVALUATIONS.values():
        of_run = evaluation.checkpoint.removeprefix("runs/")
        assert shipped.find("checkpoint" if of_run == evaluation.checkpoint else "recipe", of_run).exists()
        protocol = load_protocol(evaluation.protocol)
        assert protocol.env.name == "libero" and protocol.first_seed == 0
        assert not evaluation.wrong_instruction or protocol.swapped


def test_a_finished_evaluation_is_kept_and_not_played_again(
    full: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "runs" / "known-50")
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "libero-full")]
    monkeypatch.setattr(sys, "argv", ["libero_full.py", "known", *places])
    assert full.main() == 0
    table = script("libero_tables").full(tmp_path / "libero-full")
    row = "| `known` | `libero-object-base` | `libero-object-small` | the task's | 10 |"
    assert f"{row} 39 of 40 (87 to 100 %) |" in table
    assert len(table.splitlines()) == 3  # the others were not played


def test_a_name_that_is_none_is_refused(full: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["libero_full.py", "knwon"])
    with pytest.raises(SystemExit):
        full.main()
    assert "no evaluation 'knwon'; choose among unseen-before" in capsys.readouterr().err


@pytest.mark.sim
@pytest.mark.slow
def test_it_plays_an_evaluation_and_keeps_every_episode(
    full: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.toml").write_text(SHORT)
    monkeypatch.chdir(EVAL.parent)
    monkeypatch.setitem(
        full.EVALUATIONS, "short", full.Evaluation("metaworld-base", str(tmp_path / "short.toml"), True)
    )
    words = ["--trials", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["libero_full.py", "short", *words])
    assert full.main() == 0
    result = json.loads((tmp_path / "kept" / "short" / "result.json").read_text())
    episodes = (tmp_path / "kept" / "short" / "episodes.jsonl").read_text().splitlines()
    assert result["wrong_instruction"] and result["overall"]["episodes"] == len(episodes) == 2


def test_tasks_are_counted_and_errors_are_no_successes() -> None:
    tables = script("libero_tables")
    outcomes = {"a b 0": True, "a b 1": None, "c 0": False}
    assert tables.solved(outcomes) == {"a b": "1 of 2", "c": "0 of 1", "**all**": "1 of 3"}
