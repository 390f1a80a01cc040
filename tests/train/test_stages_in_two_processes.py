"""Stages in two processes are those of one: what learns later is synchronised as if it always had been."""

import json
import shutil
from pathlib import Path

import pytest

from tests.train.test_stages import BEGAN, BEGAN_BY_PLATEAU, GROWING, PLATEAU, STAGED, STEPS, staged
from tests.train.test_two_processes import assert_close, run_in_two, selected
from tests.train.world import learned, metrics
from tests.variants import variants
from vlafit.recipe import Recipe
from vlafit.train import run

# Sharding and resumption in two processes, and stages in one, are also tested by themselves.
pytestmark = pytest.mark.slow

HOW = {  # what each recipe of the tests changes
    "copies": {"accumulate": 2},
    "sharded": {"sharding": "full"},
    "plateau": {"validate_every": 1, "steps": 8},
    "ranks": {"validate_every": 0},
}
RESUMED = ("copies", "sharded")
TEXTS = {"plateau": PLATEAU, "ranks": GROWING}
BEGINS = {"plateau": BEGAN_BY_PLATEAU, "ranks": {1: 0, 2: 6, 3: 11}}


@pytest.fixture(scope="module")
def recipes(card: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    made = {}
    for name, changes in HOW.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = staged(
            card, folder, TEXTS.get(name, STAGED), **{"batch_size": 8, "save_every": 5, **changes}
        )
    return made


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folders one/NAME and two/NAME of the selected recipes in one process and in two.

    resumed/NAME has the runs of one process that two went on with in the midst of their second stage.
    """
    folder = tmp_path_factory.mktemp("runs")
    chosen = {name: recipes[name] for name in selected(request)}
    for name, recipe in chosen.items():
        run(recipe, folder / "one" / name)
    (folder / "two").mkdir()
    jobs = [(recipe, folder / "two" / name) for name, recipe in chosen.items()]
    for name in chosen.keys() & RESUMED:
        jobs.append((recipes[name], back_to_step_5(folder / "one" / name, folder / "resumed" / name)))
    run_in_two(jobs, folder)
    return folder


def stages(out: Path) -> dict[int, int]:
    return {e["train/stage"]: e["step"] for e in metrics(out) if "train/stage" in e}


@pytest.mark.parametrize("name", variants(HOW, always=["sharded"]))
def test_two_processes_have_the_losses_and_the_stages_of_one(runs: Path, name: str) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    for key in ("train/loss", "train/grad_norm", "validation/loss", "validation/action_error"):
        assert_close(one, two, key)
    assert stages(one) == stages(two)
    if name == "ranks":
        assert_close(one, two, "train/rank/mean")
    assert stages(two) == BEGINS.get(name, BEGAN)
    assert json.loads((two / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("name", variants(RESUMED, always=["sharded"]))
def test_two_processes_keep_the_states_of_one(runs: Path, name: str) -> None:
    one, two = learned(runs / "one" / name, STEPS), learned(runs / "two" / name, STEPS)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    for key in one:
        if "k_proj.bias" in key:
            continue  # attention ignores it: its gradient is rounding alone, which AdamW then makes a step of
        assert two[key].allclose(one[key], rtol=1e-3, atol=1e-5), key


def back_to_step_5(out: Path, to: Path) -> Path:
    """Copy a run as it was after its fifth step, in the midst of its second stage."""
    shutil.copytree(out, to)
    for folder in (to / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > 5:
            shutil.rmtree(folder)
    return to


@pytest.mark.parametrize("name", variants(RESUMED, always=["sharded"]))
def test_a_stage_that_two_processes_began_one_goes_on_with(
    runs: Path, recipes: dict[str, Recipe], tmp_path: Path, name: str
) -> None:
    out = back_to_step_5(runs / "two" / name, tmp_path / "run")
    run(recipes[name], out, resume=True)
    assert json.loads((out / "run.json").read_text())["resumed_from"] == "step_000005"
    assert_close(runs / "one" / name, out)


@pytest.mark.parametrize("name", variants(RESUMED, always=["sharded"]))
def test_a_stage_that_one_process_began_two_go_on_with(runs: Path, name: str) -> None:
    facts = json.loads((runs / "resumed" / name / "run.json").read_text())
    assert (facts["resumed_from"], facts["processes"]) == ("step_000005", 2)
    assert_close(runs / "one" / name, runs / "resumed" / name)
