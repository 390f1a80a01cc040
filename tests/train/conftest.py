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
