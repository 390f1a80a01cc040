"""Every family has a small recipe from scratch with the same budget; one command runs what is missing."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.eval_scripts import EVAL, script
from vlafit import config, shipped
from vlafit.policies import build_family, families
from vlafit.recipe import Recipe
from vlafit.tuning import load_strategy, preview

RECIPES = [name for name in shipped.names("recipe") if name.startswith("scratch-")]
FEW = ("train.steps=4", "train.save_every=1", "train.validate_every=0", "optim.warmup_steps=1",
       "eval.samples=0", "eval.protocol=", "eval.wrong_instruction=false")  # fmt: skip


def recipe_of(name: str) -> Recipe:
    return config.read(Recipe, shipped.find("recipe", name), "recipe")


# --------------------------------------------------------------------------------------------- the recipes


def test_every_family_is_in_the_table_and_openvla_with_both_of_its_heads() -> None:
    policies = [recipe_of(name).policy for name in RECIPES]
    assert {policy.family for policy in policies} == set(families())
    assert {policy.size for policy in policies if policy.family == "openvla"} == {
        "openvla-small",
        "openvla-oft-small",
    }


def test_they_differ_only_in_the_policy_and_in_draws_that_a_family_has_no_use_for() -> None:
    first, *others = [
        replace(r, name="", purpose="", policy=recipe_of(RECIPES[0]).policy) for r in map(recipe_of, RECIPES)
    ]
    alike = replace(first, train=replace(first.train, draws=1))
    assert all(replace(other, train=replace(other.train, draws=1)) == alike for other in others)


@pytest.mark.parametrize("name", RECIPES)
def test_what_learns_is_between_one_and_a_half_and_two_and_a_half_millions(name: str) -> None:
    spec = recipe_of(name).policy
    policy = build_family(spec.family, spec.size, spec.config, device="meta")
    assert 1.5e6 <= preview(policy, load_strategy("full")).trainable_parameters <= 2.5e6


# ----------------------------------------------------------------------------------------------- the table


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the page over an empty folder of results."""
    module = script("readme")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def publish(results: Path, name: str, seed: int, successes: list[bool]) -> None:
    """Write what the table reads of a run, of starts that are not errors."""
    run = results / "scratch" / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    counts = {"successes": sum(successes), "episodes": len(successes), "errors": 0}
    success = dict.fromkeys(("after", "wrong_instruction"), counts)
    (run / "report.json").write_text(json.dumps({"success": success}))
    episodes = [
        {"task": "t", "seed": start, "success": one, "error": None} for start, one in enumerate(successes)
    ]
    for key in success:
        (run / f"episodes_{key}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))


def test_the_difference_from_pi0_is_of_equal_starts(readme: ModuleType, tmp_path: Path) -> None:
    half = [start % 2 == 0 for start in range(20)]
    publish(tmp_path, "scratch-pi0", 0, half)
    publish(tmp_path, "scratch-alike", 0, half)
    publish(tmp_path, "scratch-never", 0, [False] * 20)
    rows = readme.scratch().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == ["scratch-alike", "scratch-pi0", "scratch-never"]
    assert "| +0 [" in rows[2] and "| -50 [" in rows[4]
    assert "| 1 |" in rows[2] and "| 0.0039 |" in rows[4]  # 2 * (2 / 2**10), of two comparisons


def test_a_seed_that_a_family_lacks_is_left_out_for_all(readme: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        publish(tmp_path, "scratch-pi0", seed, [True] * 10)
    publish(tmp_path, "scratch-other", 0, [True] * 10)
    assert readme.scratch().count("10 of 10 (") == 2 and "of 20" not in readme.scratch()
    publish(tmp_path, "scratch-other", 1, [False] * 10)
    assert "10 of 20 (" in readme.scratch() and "20 of 20 (" in readme.scratch()


# --------------------------------------------------------------------------------------------- the command


def test_a_finished_run_is_published_and_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, str(EVAL / "families.py"), "--seeds", "0", "--recipes", "scratch-act"]
    run = tmp_path / "runs" / "scratch-act-seed0"
    run.mkdir(parents=True)
    for name in ("recipe.toml", "report.json", "metrics.jsonl"):
        (run / name).write_text(f"{name} of {Path.cwd()}/runs\n")
    (run / "run.json").write_text('{"finished": true}')
    run.with_name("scratch-act-seed0.cpu.jsonl").write_text('{"status": 0, "cpu_s": 1.0}\n')
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    ended = subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    assert "+ vlafit" not in ended.stdout
    kept = tmp_path / "results" / "scratch-act-seed0"
    assert (kept / "recipe.toml").read_text() == "recipe.toml of runs\n"
    assert json.loads((kept / "cpu.jsonl").read_text())["cpu_s"] == 1.0


@pytest.mark.slow
def test_a_killed_command_continues_and_says_the_time_of_both_parts(tmp_path: Path) -> None:
    command = [sys.executable, str(EVAL / "families.py"), "--seeds", "0", "--recipes", "scratch-act"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--set", *FEW]
    run = tmp_path / "runs" / "scratch-act-seed0"
    first = subprocess.Popen(command)
    while not list(run.glob("checkpoints/step_*")):
        assert first.poll() is None, "ended before its first checkpoint"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while subprocess.run(command).returncode:  # until the run that was left alone has saved and ended
        time.sleep(0.5)
    kept = tmp_path / "results" / "scratch-act-seed0"
    facts = json.loads((kept / "run.json").read_text())
    assert facts["finished"] and facts["resumed_from"] is not None
    assert json.loads((kept / "cpu.jsonl").read_text().splitlines()[-1])["status"] == 0
