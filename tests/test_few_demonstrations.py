"""The search with few demonstrations: its plan, what it writes of a finished point, what its tables say."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from tests.eval_scripts import EVAL, script
from vlafit import config, files, shipped
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.train.settle import earlier

RESULTS = EVAL / "results" / "few-demonstrations"
SEARCHED = files.read_json_lines(RESULTS / "search.jsonl")


@pytest.fixture(scope="module")
def search() -> ModuleType:
    return script("few_demonstrations")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("few_demonstrations_tables")


def finish(search: ModuleType, point: Any, runs: Path) -> None:
    """Put a real run's records where the point's run would be, as if it had ended."""
    run = runs / point.name
    run.mkdir(parents=True)
    for name in ("report.json", "run.json"):
        shutil.copy(EVAL / "results" / "quickstart" / name, run / name)
    (runs / f"{point.name}.cpu.jsonl").write_text('{"cpu_s": 1.25}\n{"cpu_s": 2.25}\n')


# ---------------------------------------------------------------------------------------------- the plan


def test_every_point_has_a_name_of_its_own_and_what_it_names_is_there(search: ModuleType) -> None:
    assert len({point.name for point in search.PLAN}) == len(search.PLAN)
    for point in search.PLAN:
        assert shipped.find("recipe", search.RECIPES[point.start]).is_file()
        assert shipped.find("strategy", point.strategy).is_file()
        assert shipped.find("card", search.TASKS[point.tasks][0]).is_file()


@pytest.mark.parametrize("name", ["metaworld-faucet", "metaworld-mt50"])
def test_no_start_of_the_search_is_one_that_a_published_result_is_judged_from(
    search: ModuleType, tmp_path: Path, name: str
) -> None:
    published = load_protocol(name)
    for tasks in search.TASKS:
        searched = load_protocol(search.protocol(tasks, tmp_path, None))
        assert not set(searched.seeds()) & set(published.seeds())
        assert 48 <= len(searched.tasks) * searched.trials <= 50


# -------------------------------------------------------------------------------------------- its results


def test_a_finished_point_is_written_and_not_played_again(search: ModuleType, tmp_path: Path) -> None:
    point = search.PLAN[0]
    finish(search, point, tmp_path / "runs")
    command = [sys.executable, str(EVAL / "few_demonstrations.py"), "--only", point.name]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    ended = subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    (line,) = files.read_json_lines(tmp_path / "results" / "search.jsonl")
    assert (line["start"], line["demonstrations"], line["cpu_s"]) == ("full checkpoint", 5, 3.5)
    played = files.read_json_lines(EVAL / "results" / "quickstart" / "episodes_after.jsonl")
    closed = "".join(str(int(one["success"])) for one in played if one["task"] == "faucet-close-v3")
    assert line["outcomes"]["faucet-close-v3"] == closed
    assert line["successes"] == sum(one["success"] for one in played)


def test_a_point_that_ended_after_the_search_was_killed_is_written_without_its_time(
    search: ModuleType, tmp_path: Path
) -> None:
    finish(search, search.PLAN[0], tmp_path)
    (tmp_path / f"{search.PLAN[0].name}.cpu.jsonl").unlink()
    search.write(tmp_path, tmp_path / "results")
    (line,) = files.read_json_lines(tmp_path / "results" / "search.jsonl")
    assert line["cpu_s"] is None and line["episodes"] == 50


def test_points_that_were_played_elsewhere_stay_beside_a_new_one(search: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    *elsewhere, last = SEARCHED
    (results / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in elsewhere))
    new = search.point_of(last)
    finish(search, new, tmp_path / "runs")
    search.write(tmp_path / "runs", results)
    lines = files.read_json_lines(results / "search.jsonl")
    assert [line for line in lines if search.point_of(line) != new] == elsewhere
    assert len({search.point_of(line) for line in lines}) == len(lines) == len(SEARCHED)


@pytest.mark.slow
def test_a_point_is_an_ordinary_training_run_and_its_evaluation(search: ModuleType, tmp_path: Path) -> None:
    point = next(one for one in search.PLAN if one.steps == 30 and one.start == "untrained")
    command = [sys.executable, str(EVAL / "few_demonstrations.py"), "--only", point.name, "--trials", "1"]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    subprocess.run([*command, *folders], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (line,) = files.read_json_lines(tmp_path / "results" / "search.jsonl")
    assert line["episodes"] == 2 and line["command"].startswith("vlafit train quickstart-untrained ")
    log = (tmp_path / "runs" / f"{point.name}.log").read_text()
    assert "training 30/30" in log


@pytest.mark.parametrize("line", SEARCHED, ids=lambda line: line["command"].split()[4].rpartition("/")[2])
def test_a_published_point_is_one_of_the_plan_and_counts_its_own_outcomes(
    search: ModuleType, line: dict[str, Any]
) -> None:
    point = search.Point(**{name: line[name] for name in search.Point.__dataclass_fields__})
    assert point in search.PLAN and f"--out runs/few-demonstrations/{point.name} " in line["command"]
    outcomes = "".join(line["outcomes"].values())
    assert (outcomes.count("1"), outcomes.count("e")) == (line["successes"], line["errors"])
    assert len(outcomes) == line["episodes"] + line["errors"] and set(outcomes) <= set("01e")
    assert line["protocol_sha256"] == next(
        one["protocol_sha256"] for one in SEARCHED if one["tasks"] == line["tasks"]
    )


def test_the_picture_shows_the_points_that_are_published() -> None:
    figure = script("few_demonstrations_figure")
    with Image.open(RESULTS / "search.png") as picture:
        shown = picture.text["Description"]  # type: ignore[attr-defined]  # of a PNG
    assert shown == figure.digest(SEARCHED), "stale: run python eval/few_demonstrations_figure.py"


# --------------------------------------------------------------------------------------------- the tables


def test_a_setting_that_was_played_from_one_start_leaves_the_other_cells_empty(
    tables: ModuleType, tmp_path: Path
) -> None:
    lines = [line for line in SEARCHED if line["start"] != "untrained"]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row in tables.searched(tmp_path).splitlines()[2:]:
        assert row.endswith("|  |") and " of " in row


def test_the_difference_from_the_full_checkpoint_is_of_equal_starts_and_seeds(
    tables: ModuleType, tmp_path: Path
) -> None:
    for name, solved in (("few-demonstrations", 10), ("few-demonstrations-untrained", 5)):
        for seed in (0, 1):
            run = tmp_path / "starts" / f"{name}-seed{seed}"
            run.mkdir(parents=True)
            after = {"successes": solved, "episodes": 10, "errors": 0}
            (run / "report.json").write_text(json.dumps({"success": {"after": after}}))
            rows = [{"task": "t", "seed": i, "success": i < solved, "error": None} for i in range(10)]
            (run / "episodes_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    full, untrained = tables.published(tmp_path).splitlines()[2:]
    assert full.startswith("| full checkpoint ") and "| 20 of 20 (" in full and full.endswith("|  |  |")
    assert "| 10 of 20 (" in untrained and "| -50 [" in untrained
    assert untrained.endswith("| 0.062 |")  # 2 / 2**5: five starts, each lost under both seeds


# ---------------------------------------------------------------------------------- strategies, published


def kept_recipe(run: Path) -> Recipe:
    return earlier(config.read(Recipe, run / "recipe.toml", "recipe"))


@pytest.fixture(scope="module")
def strategies() -> ModuleType:
    return script("few_demonstrations_strategies")


@pytest.mark.parametrize("seeds", ["first", "others"])
def test_every_strategy_is_played_at_the_best_of_at_least_two_rates_that_the_search_tried(
    search: ModuleType, strategies: ModuleType, tables: ModuleType, seeds: str
) -> None:
    """The best for training seed 0 and, but for the expert, over the seeds that no published run has."""
    fixed = [*strategies.STRATEGIES.values(), ("full", 2e-3)]  # of the recipe few-demonstrations
    chosen = (0,) if seeds == "first" else search.SEEDS
    for strategy in {strategy for strategy, _ in fixed} - ({"expert"} if seeds == "others" else set()):
        tried: dict[float, list[int]] = {}
        for line in filter(tables.is_of_strategies, SEARCHED):
            if line["strategy"] == strategy and line["seed"] in chosen:
                tried.setdefault(line["lr"], []).append(line["successes"])
        sums = {rate: sum(of) for rate, of in tried.items() if len(of) == len(chosen)}
        assert len(sums) >= 2 and (strategy, max(sums, key=lambda rate: sums[rate])) in fixed, strategy


def test_published_strategies_differ_in_strategy_and_rate_alone(strategies: ModuleType) -> None:
    runs = strategies.published(RESULTS / "strategies")
    assert runs.keys() == {"full", *strategies.STRATEGIES}
    beside: dict[str, Any] = {"threads": 0, "checkpoints": "auto"}  # how fast it ran, and what was saved
    for seed in runs["full"]:
        full = kept_recipe(runs["full"][seed])
        for name, (strategy, lr) in strategies.STRATEGIES.items():
            recipe = kept_recipe(runs[name][seed])
            assert (recipe.strategy, recipe.optim.lr, recipe.train.seed) == (strategy, lr, seed)
            assert replace(recipe.optim, lr=0) == replace(full.optim, lr=0)
            assert replace(recipe.train, **beside) == replace(full.train, **beside)
            assert (recipe.data, recipe.policy) == (full.data, full.policy)
