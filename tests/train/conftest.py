from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.world import tiny, write_dots
from vlafit.recipe import Recipe
from vlafit.train import run


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of the recorded dots; nobody may change its files."""
    return write_dots(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def recipe(card: Path) -> Recipe:
    return tiny(card)


@pytest.fixture(scope="session")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe's run that nobody interrupted; nobody may change it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(replace(recipe, train=replace(recipe.train, report=True)), out).finished
    return out


@pytest.fixture(scope="module")
def base(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a full run of one step on the dots; each module has its own."""
    out = tmp_path_factory.mktemp("base") / "run"
    run(tiny(card, train={"steps": 1, "validate_every": 0, "save_every": 0}), out)
    return out / "checkpoints" / "step_000001"
