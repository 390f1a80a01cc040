from pathlib import Path

import pytest

from tests.train.world import write_dots
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.offline import Episodes


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Eight recorded episodes: actions are normal around (1, 0) or (-1, 0) with deviation 0.3."""
    card: Path = write_dots(tmp_path_factory.mktemp("dots"))
    return open_dataset(card)


@pytest.fixture(scope="session")
def split(dots: EpisodeStore) -> Episodes:
    """Two episodes of each task to evaluate on, two that were learned."""
    ids = [info.id for info in dots.episodes]
    return Episodes(tuple(ids[::2]), tuple(ids[1::2]), "Held out.")
