"""500 episodes a point: what is taken over, played and refused, and that what is published holds."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.eval_scripts import EVAL, script
from vlafit import files, shipped
from vlafit.cli import main
from vlafit.errors import VlafitError
from vlafit.rollout import load_protocol

RESULTS = EVAL / "results" / "few-demonstrations"
PUBLISHED = sorted(path.parent for path in RESULTS.glob("*/*-seed*/report.json"))
LONGER = sorted(path.parent for path in RESULTS.glob("*/*-seed*/result_84_starts.json"))


@pytest.fixture
def longer() -> ModuleType:
    return script("few_demonstrations_500")


def published_lines() -> list[str]:
    return (PUBLISHED[0] / "episodes_after.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


# ------------------------------------------------------------------------------------------ what is published


def test_the_protocol_has_more_starts_and_the_published_ones_first(longer: ModuleType) -> None:
    protocol, before = load_protocol(longer.PROTOCOL), load_protocol("metaworld-faucet")
    assert replace(before, name=protocol.name, trials=protocol.trials).sha256() == protocol.sha256()
    assert protocol.sha256() != before.sha256()
    assert protocol.seeds()[: before.trials] == before.seeds()
    assert 3 * len(protocol.tasks) * protocol.trials >= 500


@pytest.mark.parametrize("kind", ["starts", "strategies"])
def test_every_published_run_of_a_table_has_its_longer_evaluation(kind: str) -> None:
    assert [run for run in PUBLISHED if run.parent.name == kind] == [
        run for run in LONGER if run.parent.name == kind
    ]


@pytest.mark.parametrize("run", LONGER, ids=lambda run: run.name)
def test_a_longer_evaluation_is_of_the_published_checkpoint_and_begins_with_its_episodes(
    longer: ModuleType, run: Path
) -> None:
    result = json.loads((run / "result_84_starts.json").read_text(encoding="utf-8"))
    after = json.loads((run / "report.json").read_text(encoding="utf-8"))["evaluations"]["after"]
    protocol = load_protocol(longer.PROTOCOL)
    assert result["actor"] == after["actor"] and "sha256:" in result["actor"]
    assert result["protocol_sha256"] == protocol.sha256() and result["complete"]
    assert {**result["versions"], **result["software"]} == after["versions"]
    episodes = files.read_json_lines(run / "episodes_84_starts.jsonl")
    starts = [(task, seed) for task in protocol.tasks for seed in protocol.seeds()]
    assert [(one["task"], one["seed"]) for one in episodes] == starts
    successes = sum(one["success"] is True for one in episodes)
    assert (result["overall"]["successes"], result["overall"]["episodes"]) == (successes, len(starts))
    longer.require_equal(run / "episodes_after.jsonl", run / "episodes_84_starts.jsonl")


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("key", "value"), [("success", None), ("steps", 1), ("action_change", 0.5), ("instruction", "turn")]
)
def test_an_episode_that_is_not_as_published_is_named(
    longer: ModuleType, tmp_path: Path, key: str, value: object
) -> None:
    lines = published_lines()
    other = {**json.loads(lines[7]), key: value}
    (tmp_path / "played.jsonl").write_text("".join([*lines[:7], json.dumps(other) + "\n", *lines[8:]]))
    with pytest.raises(VlafitError, match=f"faucet-open-v3, seed 60007, is not as published: {key} is "):
        longer.require_equal(PUBLISHED[0] / "episodes_after.jsonl", tmp_path / "played.jsonl")


def test_an_episode_that_is_missing_is_named_and_its_time_may_differ(
    longer: ModuleType, tmp_path: Path
) -> None:
    lines = published_lines()
    slower = {**json.loads(lines[0]), "wall_s": 1e3}
    (tmp_path / "played.jsonl").write_text("".join([json.dumps(slower) + "\n", *lines[1:-1]]))
    with pytest.raises(VlafitError, match="faucet-close-v3, seed 60024, is not as published"):
        longer.require_equal(PUBLISHED[0] / "episodes_after.jsonl", tmp_path / "played.jsonl")


def test_all_runs_of_a_seed_are_played_before_those_of_the_next(longer: ModuleType) -> None:
    order = longer.wanted(RESULTS, [0, 1, 2])
    assert sorted(order) == PUBLISHED
    assert [int(run.name[-1]) for run in order] == sorted(int(run.name[-1]) for run in order)
    assert [run.name for run in longer.wanted(RESULTS, [2], ["lora"])] == ["lora-seed2"]


def test_the_longer_evaluation_counts_only_if_all_runs_have_it(tmp_path: Path) -> None:
    tables = script("few_demonstrations_tables")
    for name, solved in (("few-demonstrations", 3), ("few-demonstrations-untrained", 1)):
        run = tmp_path / "starts" / f"{name}-seed0"
        run.mkdir(parents=True)
        counts = {"successes": solved, "episodes": 5, "errors": 0}
        (run / "report.json").write_text(json.dumps({"success": {"after": counts}}))
        (run / "result_84_starts.json").write_text(
            json.dumps({"overall": {**counts, "successes": solved + 4, "episodes": 10}})
        )
        for evaluation, starts, more in (("after", 5, 0), ("84_starts", 10, 4)):
            rows = [
                {"task": "t", "seed": i, "success": i < solved + more, "error": None} for i in range(starts)
            ]
            (run / f"episodes_{evaluation}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    full, untrained = tables.published(tmp_path).splitlines()[2:]
    assert "| 7 of 10 (" in full and "| 5 of 10 (" in untrained and "| -20 [" in untrained
    (tmp_path / "starts" / "few-demonstrations-seed0" / "result_84_starts.json").unlink()
    full, untrained = tables.published(tmp_path).splitlines()[2:]
    assert "| 3 of 5 (" in full and "| 1 of 5 (" in untrained and "| -40 [" in untrained


# ------------------------------------------------------------------------------------------- played for real


@pytest.fixture
def evaluated(longer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a results folder with one run: the shipped checkpoint, played from three short starts of a task.

    Its longer protocol has four starts of each task, of which the last two of the three are played again.
    """
    for name, starts in (("short", 3), ("longer", 4)):
        text = f'base = "metaworld-faucet"\nname = "{name}"\ntrials = {starts}\n'
        (tmp_path / f"{name}.toml").write_text(text + "horizon = 8\nreplan = 8\nwidth = 4\n")
    monkeypatch.setattr(longer, "PROTOCOL", str(tmp_path / "longer.toml"))
    monkeypatch.setattr(longer, "AGAIN", 2)
    run = tmp_path / "runs" / "starts" / "few-demonstrations-seed0"
    shutil.copytree(shipped.find("checkpoint", "metaworld-base"), run)
    words = ["--protocol", str(tmp_path / "short.toml"), "--workers", "1", "--videos", "0"]
    assert main(["eval", str(run), *words, "--out", str(run / "eval" / "after")]) == 0
    (run / "run.json").write_text('{"finished": true}')
    kept = tmp_path / "results" / "starts" / run.name
    kept.mkdir(parents=True)
    shutil.copy(run / "eval" / "after" / "episodes.jsonl", kept / "episodes_after.jsonl")
    (kept / "report.json").write_text("{}")
    monkeypatch.setattr(
        sys,
        "argv",
        ["", "--seeds", "0", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")],
    )
    monkeypatch.setattr(longer, "draw", lambda results: None)  # it compares several runs
    return kept


@pytest.mark.sim
def test_a_run_of_another_protocol_is_not_taken_over(
    longer: ModuleType, evaluated: Path, tmp_path: Path
) -> None:
    path = tmp_path / "longer.toml"
    path.write_text(path.read_text().replace("horizon = 8", "horizon = 9"))
    with pytest.raises(VlafitError, match="its protocol short is not .*longer.toml with fewer starts"):
        longer.main()
    assert not (tmp_path / "runs" / "84_starts").exists()


@pytest.mark.sim
@pytest.mark.slow
def test_it_takes_over_plays_the_rest_goes_on_and_refuses_another_checkpoint(
    longer: ModuleType, evaluated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "starts" / evaluated.name
    out = tmp_path / "runs" / "84_starts" / evaluated.name
    longer.take_over(run / "eval" / "after", out)
    assert len(files.read_json_lines(out / "episodes.jsonl")) == 2  # the first of three, of both tasks
    assert longer.main() == 0
    episodes = files.read_json_lines(evaluated / "episodes_84_starts.jsonl")
    assert [one["trial"] for one in episodes] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert json.loads((evaluated / "result_84_starts.json").read_text())["overall"]["episodes"] == 8
    (out / "result.json").unlink()  # as after an interruption, with the last episode to play
    files.write_atomic(out / "episodes.jsonl", "".join(json.dumps(one) + "\n" for one in episodes[:-1]))
    (evaluated / "result_84_starts.json").unlink()
    assert longer.main() == 0
    again = files.read_json_lines(evaluated / "episodes_84_starts.jsonl")
    assert again[:-1] == episodes[:-1] and {**again[-1], "wall_s": 0} == {**episodes[-1], "wall_s": 0}
    shutil.rmtree(out)
    (evaluated / "result_84_starts.json").unlink()
    header = run / "eval" / "after" / "evaluation.json"
    files.write_atomic(header, header.read_text().replace("checkpoint sha256:", "checkpoint sha256:0"))
    with pytest.raises(subprocess.CalledProcessError):
        longer.main()
    assert (
        "holds another evaluation" in (log := (out.parent / f"{out.name}.log").read_text())
        and "actor: checkpoint" in log
    )
    assert not (evaluated / "result_84_starts.json").exists()
