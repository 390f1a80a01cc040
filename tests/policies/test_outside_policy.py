"""A family from outside the package goes through everything that a shipped one does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.policies.outside_policy import Regression
from tests.train.world import assert_same, learned, metrics, tiny, write_dots
from vlafit import checkpoints
from vlafit.actor import load_actor
from vlafit.checkpoints.export import export
from vlafit.errors import ConfigError, StrategyError, WeightsError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.rollout import evaluate
from vlafit.train import run
from vlafit.train.callbacks import Callbacks
from vlafit.train.loop import StepResult

FAMILY = "tests.policies.outside_policy"
LORA = """
purpose = "LoRA on the trunk; the head learns."
[[rule]]
select = { part = "trunk" }
mode = "lora"
rank = 4
[[rule]]
select = { part = "head" }
mode = "full"
[[rule]]
mode = "frozen"
"""


class CrashAt5(Callbacks):
    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        if result.step == 5:
            raise InterruptedError


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def adapted(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA that nobody interrupted; nobody may change it."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "lora.toml").write_text(LORA)
    assert run(recipe(card, strategy=str(folder / "lora.toml")), folder / "run").finished
    return folder


def recipe(card: Path, **sections: object) -> Recipe:
    made = tiny(card, **sections)  # type: ignore[arg-type]
    return replace(made, policy=PolicyRecipe(family=FAMILY, size="tiny"))


def test_it_trains_and_validates(card: Path, tmp_path: Path):
    assert run(
        recipe(card, train={"steps": 40, "save_every": 0}, optim={"lr": 1e-2}), tmp_path / "run"
    ).finished
    validated = [event for event in metrics(tmp_path / "run") if "validation/loss" in event]
    assert validated[-1]["validation/loss"] < validated[0]["validation/loss"]
    assert validated[-1]["validation/action_error"] < validated[0]["validation/action_error"]


def test_a_run_with_lora_that_broke_off_is_resumed_bit_for_bit(card: Path, adapted: Path, tmp_path: Path):
    made = recipe(card, strategy=str(adapted / "lora.toml"))
    with pytest.raises(InterruptedError):
        run(made, tmp_path / "run", callbacks=CrashAt5())
    assert run(made, tmp_path / "run", resume=True).finished
    assert_same(learned(tmp_path / "run", 8), learned(adapted / "run", 8))


def test_it_is_evaluated_in_closed_loop(card: Path, adapted: Path, tmp_path: Path):
    actor = load_actor(adapted / "run" / "checkpoints" / "step_000008", width=2, device="cpu")
    assert "steps=" not in actor.fingerprint()
    result = evaluate(actor, card.parent / "toy.toml", tmp_path / "eval", workers=1, videos=0)
    assert result.overall.episodes == 4
    with pytest.raises(ConfigError, match="steps 3: Regression"):
        load_actor(adapted / "run" / "checkpoints" / "step_000008", steps=3, device="cpu")


def test_it_is_exported_merged_and_its_files_name_its_module(adapted: Path, tmp_path: Path):
    folder = adapted / "run" / "checkpoints" / "step_000008"
    exported = export(folder, "vlafit", tmp_path / "out", merge=True)
    # Two adapted products of 36 terms round 4 times each: 2 * 2^-24 * sqrt(4 * 2 * 36) = 2e-6 of an action,
    # and normalised actions are below 5.
    assert exported.merge_error is not None and exported.merge_error < 1e-5
    assert json.loads((tmp_path / "out" / "policy.json").read_text())["family"] == FAMILY
    loaded = checkpoints.load(tmp_path / "out")
    assert type(loaded.policy) is Regression and loaded.plan is None
    assert loaded.codec is not None and loaded.codec.tokenizer is None
    assert not (tmp_path / "out" / "tokenizer").exists()
    with pytest.raises(WeightsError):
        export(folder, "lerobot", tmp_path / "other")


def test_a_strategy_that_names_parts_of_other_families_is_refused_by_name(card: Path, tmp_path: Path):
    with pytest.raises(StrategyError, match="'vision'.*eye, head, trunk"):
        run(recipe(card, strategy="lora"), tmp_path / "run")
