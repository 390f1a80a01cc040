from pathlib import Path

import pytest

from tests.train.world import tiny, write_dots
from vlafit.recipe import Recipe


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of the recorded dots; nobody may change its files."""
    return write_dots(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of other recordings of the same robot, to validate on."""
    return write_dots(tmp_path_factory.mktemp("old"), seed=3)


@pytest.fixture(scope="session")
def recipe(card: Path, old: Path) -> Recipe:
    """Four steps, judged by the toy protocol, with a named validation set."""
    return tiny(
        card,
        data={"validation_sets": {"old": str(old)}},
        train={"steps": 4, "validate_every": 2, "save_every": 0, "threads": 0},
        eval={"protocol": str(card.parent / "toy.toml"), "after": True, "wrong_instruction": True},
    )
