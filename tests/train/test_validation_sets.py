"""Named validation sets, peak memory, time budget: what a comparison of strategies needs of a run."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.world import assert_same, learned, metrics, tiny, write_dots
from vlafit import config
from vlafit.checkpoints import read_lineage
from vlafit.datasets import load_card, open_dataset
from vlafit.errors import DataError, VlafitError
from vlafit.recipe import OptimRecipe, Recipe
from vlafit.shipped import find
from vlafit.train import run
from vlafit.train.data import open_data
from vlafit.train.episode_warnings import split_warnings
from vlafit.train.experiment import build
from vlafit.train.memory import larger
from vlafit.train.optim import schedule


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of other recordings of the same robot."""
    return write_dots(tmp_path_factory.mktemp("other"), episodes=2, tasks=("right",))


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("third"), episodes=2, seed=3)


@pytest.fixture(scope="module")
def finished(card: Path, other: Path, third: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "run"
    sets = {"old": str(other), "both": (str(other), str(third))}
    assert run(tiny(card, data={"validation_sets": sets}), out).finished
    return out


# ------------------------------------------------------------------------------------------------------ sets


def test_each_named_set_has_its_loss_from_step_0_on(finished: Path) -> None:
    for name in ("validation/loss", "validation/old/loss", "validation/both/loss"):
        assert [event["step"] for event in metrics(finished) if name in event] == [0, 4, 8]


def test_an_episode_that_is_trained_on_is_refused_in_a_validation_set_and_in_the_held_out_share(
    card: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.validation_sets\.copy.*demo_\d.*card 'dots'.*episodes\.skip"):
        build(tiny(card, data={"validation_sets": {"copy": str(card)}}), torch.device("cpu"))
    twice = write_dots(tmp_path / "set", episodes=2, tasks=("right",))
    shutil.copy(tmp_path / "set/dots/right_demo.hdf5", tmp_path / "set/dots/right (1)_demo.hdf5")
    with pytest.raises(DataError, match=r"right.* is episode .*right"):
        build(tiny(twice, data={"validation": 0.5}), torch.device("cpu"))


def test_a_run_records_which_episodes_its_cards_leave_out_and_why(finished: Path, tmp_path: Path) -> None:
    assert json.loads((finished / "run.json").read_text())["left_out"] == {}
    card = write_dots(tmp_path, episodes=3)
    card.write_text(card.read_text() + '\n[episodes]\nskip = ["left_demo/demo_1"]\n')
    data = build(tiny(card), torch.device("cpu")).data
    assert data.left_out() == {"dots": {"left_demo/demo_1": "on the skip list of the card"}}


@pytest.mark.slow
def test_a_named_set_changes_no_weight(finished: Path, whole: Path) -> None:
    assert_same(learned(finished, 8), learned(whole, 8))


def test_the_loss_on_a_set_is_the_same_whatever_other_sets_there_are(
    card: Path, other: Path, finished: Path, tmp_path: Path
) -> None:
    alone = tiny(card, data={"validation_sets": {"old": str(other)}}, train={"steps": 1, "save_every": 0})
    run(alone, tmp_path / "run")

    def first(out: Path, name: str) -> float:
        return next(event[name] for event in metrics(out) if name in event)

    assert first(tmp_path / "run", "validation/old/loss") == first(finished, "validation/old/loss")


def test_a_recipe_says_one_card_or_several(card: Path) -> None:
    text = config.dump(tiny(card, data={"validation_sets": {"a": "x", "b": ("y", "z")}}))
    read = config.build(Recipe, tomllib.loads(text), "recipe")
    assert read.data.validation_sets == {"a": "x", "b": ("y", "z")}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("hz = 10.0", "hz = 20.0", r"data\.validation_sets\.old: .*the training data.*20"),
        ('name = "front"\nkey', 'name = "back"\nkey', r"data\.validation_sets\.old: .*back"),
        ('path = "dots"', 'path = "nowhere"', r"nowhere"),
    ],
)
def test_a_set_of_another_robot_or_of_none_is_refused_before_training(
    card: Path, other: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = other.read_text()
    assert old in text
    unlike = other.with_name("unlike.toml")
    unlike.write_text(text.replace(old, new))
    with pytest.raises(VlafitError, match=f"(?s){says}"):
        run(tiny(card, data={"validation_sets": {"old": str(unlike)}}), tmp_path / "run")
    assert not list(tmp_path.glob("run/*")), "nothing is written, so the same command works once mended"


@pytest.mark.parametrize(
    ("sets", "says"),
    [({"a/b": "x"}, "part of a metric's name"), ({"old": ()}, "names no data card"), ({"old": "x"}, "'x'")],
)
def test_a_set_that_cannot_be_is_refused(card: Path, tmp_path: Path, sets: dict[str, Any], says: str) -> None:
    with pytest.raises(VlafitError, match=says):
        run(tiny(card, data={"validation_sets": sets}), tmp_path / "run")


def test_the_sample_of_the_pretraining_tasks_holds_no_episode_that_the_checkpoint_learned_from() -> None:
    seen = read_lineage(find("checkpoint", "metaworld-base")).seeds
    store = open_dataset(load_card("metaworld-pretrain-sample"))
    assert len(store.episodes) == 28
    assert all(e.seed is not None and e.task in seen and e.seed not in seen[e.task] for e in store.episodes)
    assert sum(p.stat().st_size for p in store.card.files()) < 3e6


# ---------------------------------------------------------------------------------------------------- memory


def test_run_json_says_what_the_peak_memory_consists_of(finished: Path) -> None:
    facts = json.loads((finished / "run.json").read_text())["memory"]
    parts = facts["parts"]
    assert set(parts) == {"weights", "gradients", "optimiser", "average", "program", "rest"}
    assert facts["peak"] == facts["rss"] >= sum(parts.values()) - parts["rest"]
    trained = parts["gradients"]
    assert 0 < trained <= parts["weights"] and parts["average"] == trained
    assert 2 * trained <= parts["optimiser"] <= 2 * trained + 4096  # two moments, and AdamW's counts


def test_what_is_frozen_has_neither_gradients_nor_optimiser_states(card: Path, tmp_path: Path) -> None:
    run(tiny(card, strategy="projections", train={"steps": 1, "save_every": 0}), tmp_path / "run")
    parts = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]["parts"]
    assert parts["gradients"] < 0.2 * parts["weights"]
    assert parts["optimiser"] <= 2 * parts["gradients"] + 4096


def test_of_several_sessions_the_highest_peak_is_kept(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    run(recipe, out, resume=True)  # trains nothing more
    memory = [json.loads((one / "run.json").read_text())["memory"] for one in (out, whole)]
    assert memory[0] == memory[1] is not None
    assert larger({"peak": 3}, {"peak": 4}) == {"peak": 4} and larger(None, None) is None


# -------------------------------------------------------------------------------------- nothing is held out


@pytest.mark.case(
    section="runs",
    report="no validation loss, and no best checkpoint",
    user_has="a dataset whose episodes all have instructions of their own, or a single episode",
    now="a warning: no task has an episode to spare; kept in run.json",
)
def test_a_split_that_holds_nothing_out_is_reported(tmp_path: Path, other: Path):
    alone = write_dots(tmp_path / "alone", episodes=1)
    (warning,) = build(tiny(alone), torch.device("cpu")).warnings
    assert "data.validation = 0.25 holds no episode out, because each of the 2 tasks has one" in warning
    assert "Set data.validation = 0.5 to hold out one of 2" in warning
    assert "data.validation_sets" in warning and "best" in warning
    sets = tiny(alone, data={"validation_sets": {"old": str(other)}})
    (warning,) = build(sets, torch.device("cpu")).warnings
    assert "only the validation sets tell" in warning
    assert build(tiny(alone, data={"validation": 0.0}), torch.device("cpu")).warnings == ()
    more = tiny(alone, data={"validation": 0.9}).data
    (warning,) = split_warnings(more, open_data(more, 0))
    assert "1 of these are held out, so nothing trains on their instructions ('" in warning
    with pytest.raises(DataError, match="has no episode 'demo_7'; it can be one of: left_demo/demo_0"):
        open_dataset(load_card(alone)).index("demo_7")


# ------------------------------------------------------------------------------------------------------ time


def test_a_run_whose_time_is_up_is_finished_and_stays_so(card: Path, tmp_path: Path) -> None:
    limit = {"steps": 1_000_000, "max_seconds": 0.6, "validate_every": 0, "save_every": 0, "log_every": 1}
    recipe, out = tiny(card, train=limit), tmp_path / "run"
    summary = run(recipe, out)
    assert summary.finished and 1 < summary.steps < 1_000_000
    last = metrics(out)[-2:]
    assert all(event["step"] == summary.steps for event in last) and "validation/loss" in last[0] | last[1]
    rate = next(event["train/lr"] for event in last if "train/lr" in event)
    assert rate < 0.5 * recipe.optim.lr, "the learning rate falls by the time, for the steps never end"
    assert run(recipe, out, resume=True).steps == summary.steps


def test_more_time_than_the_steps_need_changes_nothing(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    run(replace(recipe, train=replace(recipe.train, max_seconds=1e6)), tmp_path / "run")
    ours, theirs = learned(tmp_path / "run", 8), learned(whole, 8)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4


def test_the_schedule_follows_whatever_ends_first() -> None:
    recipe = OptimRecipe(warmup_steps=4, final_lr=0.1)
    assert schedule(2, 100, recipe, spent=0.9) == schedule(2, 100, recipe), "warm-up goes by steps"
    assert schedule(5, 100, recipe, spent=1.0) == pytest.approx(0.1)
    assert schedule(90, 100, recipe, spent=0.1) == schedule(90, 100, recipe)
