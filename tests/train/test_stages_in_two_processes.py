"""Stages in two processes are those of one: what learns later is synchronised as if it always had been."""

import json
import shutil
from pathlib import Path

import pytest

from tests.train.test_stages import BEGAN, BEGAN_BY_PLATEAU, GROWING, PLATEAU, STAGED, STEPS, staged
from tests.train.test_two_processes import assert_close, run_in_two
from tests.train.world import learned, metrics
from vlafit.recipe import Recipe
from vlafit.train import run

HOW = {  # what each recipe of the tests changes
    "copies": {"accumulate": 2},
    "sharded": {"sharding": "full"},
    "plateau": {"validate_every": 1, "steps": 8},
    "ranks": {"validate_every": 0},
}
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
def runs(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders one/NAME and two/NAME of the same recipes in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in recipes.items():
        run(recipe, folder / "one" / name)
    (folder / "two").mkdir()
    run_in_two([(recipe, folder / "two" / name) for name, recipe in recipes.items()], folder)
    return folder


def stages(out: Path) -> dict[int, int]:
    return {e["train/stage"]: e["step"] for e in metrics(out) if "train/stage" in e}


@pytest.mark.parametrize("name", HOW)
def test_two_processes_have_the_losses_and_the_stages_of_one(runs: Path, name: str) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    for key in ("train/loss", "train/grad_norm", "validation/loss", "validation/action_error"):
        assert_close(one, two, key)
    assert stages(one) == stages(two)
    if name == "ranks":
        assert_close(one, two, "train/rank/mean")
    assert stages(two) == BEGINS.get(name, BEGAN)
    assert json.loads((two / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("name", ["copies", "sharded"])
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


@pytest.mark.parametrize("name", ["copies", "sharded"])
def test_a_stage_that_two_processes_began_one_goes_on_with(
    runs: Path, recipes: dict[str, Recipe], tmp_path: Path, name: str
) -> None:
    out = back_to_step_5(runs / "two" / name, tmp_path / "run")
    run(recipes[name], out, resume=True)
    assert json.loads((out / "run.json").read_text())["resumed_from"] == "step_000005"
    assert_close(runs / "one" / name, out)


def test_a_stage_that_one_process_began_two_go_on_with(
    runs: Path, recipes: dict[str, Recipe], tmp_path: Path
) -> None:
    outs = {n: back_to_step_5(runs / "one" / n, tmp_path / n) for n in ("copies", "sharded")}
    run_in_two([(recipes[name], out) for name, out in outs.items()], tmp_path)
    for name, out in outs.items():
        assert json.loads((out / "run.json").read_text())["resumed_from"] == "step_000005"
        assert_close(runs / "one" / name, out)
