"""What a recipe asks for in vain is said at the start, in the run's record and on its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlafit import config
from vlafit.errors import ConfigError
from vlafit.policies import build_family
from vlafit.policies.xvla import TIMES
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.experiment import Experiment, build, never_learned
from vlafit.train.preflight import check, never_began, run_warnings
from vlafit.tuning import Plan, load_strategy, parse, preview

REST = {"mode": "frozen"}
EXPERT = {"select": {"part": "expert"}, "mode": "full"}


def staged(*moments: dict, warmup: int = 0) -> dict:
    later = [{"begin": moment, "warmup_steps": warmup, "rule": [{"mode": "full"}]} for moment in moments]
    return {"stage": [{"name": "first", "rule": [EXPERT, REST]}, *later]}


@pytest.fixture(scope="module")
def made(recipe: Recipe) -> Experiment:
    import torch

    return build(recipe, torch.device("cpu"))


def plan_of(made: Experiment, strategy: dict) -> Plan:
    for parameter in made.policy.parameters():
        parameter.requires_grad_(True)
    return preview(made.policy, parse(strategy, name="mine", where="test"))


def test_a_recipe_whose_settings_all_take_effect_has_no_warnings(recipe: Recipe, made: Experiment) -> None:
    assert run_warnings(recipe, made.plan, made.data, 1) == ()
    assert (
        run_warnings(replace(recipe, train=replace(recipe.train, sharding="full")), made.plan, made.data, 2)
        == ()
    )


@pytest.mark.parametrize(
    ("section", "changes", "facts"),
    [
        ("data", {"episodes_per_task": 9}, ["episodes_per_task is 9", "'dots'", "2 of its 2 tasks (left 3"]),
        ("optim", {"warmup_steps": 8}, ["optim.warmup_steps = 8", "0.000889", "optim.lr = 0.001"]),
        ("train", {"sharding": "full"}, ["train.sharding = 'full'", "one process"]),
    ],
)
def test_a_setting_with_less_effect_than_it_asks_for_is_a_warning(
    recipe: Recipe, made: Experiment, section: str, changes: dict, facts: list[str]
) -> None:
    asked = replace(recipe, **{section: replace(getattr(recipe, section), **changes)})
    (warning,) = run_warnings(asked, made.plan, made.data, 1)
    assert all(fact in warning for fact in facts)


def test_a_warm_up_as_long_as_its_stage_is_a_warning(recipe: Recipe, made: Experiment) -> None:
    plan = plan_of(made, staged({"step": 4}, {"step": 6}, warmup=2))
    first, second = run_warnings(recipe, plan, made.data, 1)
    assert "stage 2 of 3 takes 2 steps" in first and "lasts 2" in first and "stage 3 of 3" in second


def test_stages_that_never_began_are_a_warning(recipe: Recipe, made: Experiment) -> None:
    plan = plan_of(made, staged({"plateau": 2}))
    assert never_began(plan, 1, 8) == ""
    assert "after step 8 in stage 1 of 2, first, so stage 2 of 2 never began" in never_began(plan, 0, 8)


def test_warnings_are_in_the_run_and_its_report(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.toml").write_text(config.dump(staged({"plateau": 2})))
    short = replace(
        recipe,
        strategy=str(tmp_path / "mine.toml"),
        optim=replace(recipe.optim, warmup_steps=4),
        train=replace(recipe.train, steps=4, validate_every=1, report=True),
    )
    assert run(short, tmp_path / "run").finished
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    subjects = [warning.split(":")[0].split(" is")[0] for warning in record["notices"]]
    assert subjects == ["optim.warmup_steps = 4", "strategy 'mine'"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "never optim.lr" in page and "stage 2 of 2 never began" in page
    assert "never began" in caplog.text


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"packing": "rows"}, "train.packing"),
        ({"recompute": "selective"}, "train.recompute"),
    ],
)
def test_what_compiled_blocks_do_not_go_with_is_refused(train: dict, named: str) -> None:
    tables = {"train": {"compile": "blocks", **train}, "data": {"cards": ["a.toml"]}}
    with pytest.raises(ConfigError, match=rf'train\.compile = "blocks"|{named}') as error:
        check(config.build(Recipe, tables, "a recipe"), 1)
    assert named in str(error.value) and "train.compile" in str(error.value)


def test_weights_that_are_drawn_anew_and_never_learn_are_a_warning() -> None:
    policy = build_family("xvla", "xvla-tiny")
    fresh = {"soft_prompts.weight", "action_encoder.fc.weight", TIMES}
    (warning,) = never_learned(fresh, preview(policy, load_strategy("lora")))
    for fact in ("soft_prompts.weight", "'lora'", 'part = "soft_prompts"', 'mode = "full"'):
        assert fact in warning
    assert "action_encoder" not in warning and TIMES not in warning  # trained in full; a constant
    for strategy in ("full", "slow-backbone"):
        assert not list(never_learned(fresh, preview(policy, load_strategy(strategy))))
    later = parse(staged({"step": 2}), name="mine", where="test")
    assert not list(never_learned(fresh, preview(policy, later)))
