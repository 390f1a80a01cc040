"""Named validation sets: whole datasets that are never trained on, each with a loss of its own.

The episodes that training holds out tell how well the new task is learnt; a sample of what the checkpoint was
pretrained on tells what it forgets meanwhile. The recipe's table `data.validation_sets` names them.
"""

from collections.abc import Mapping, Sequence

from vlafit.datasets import EpisodeStore, load_card, open_dataset
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.recipe import DataRecipe
from vlafit.types import Embodiment, renderer_notice, require_same

Sets = Mapping[str, tuple[EpisodeStore, ...]]


def cards_of(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the cards of one entry of `data.validation_sets`, which may be a single name."""
    return (value,) if isinstance(value, str) else value


def open_sets(recipe: DataRecipe, robot: Embodiment, relative: Sequence[bool]) -> Sets:
    """Open every named validation set, and compare its robot with `robot`, that of the training data.

    `relative` says which action dimensions the training cards make relative. Raises ConfigError, DataError or
    EmbodimentError naming the set.
    """
    return {
        name: _open(name, cards_of(cards), robot, relative) for name, cards in recipe.validation_sets.items()
    }


def _open(
    name: str, cards: tuple[str, ...], robot: Embodiment, relative: Sequence[bool]
) -> tuple[EpisodeStore, ...]:
    where = f"data.validation_sets.{name}"
    if not cards:
        raise ConfigError(f"{where} names no data card; name at least one, or leave the set out")
    stores = []
    for named in cards:
        card = load_card(named)
        store = open_dataset(card)
        try:
            require_same(store.embodiment, f"card {card.name!r}", robot, "the training data")
        except EmbodimentError as error:
            raise EmbodimentError(f"{where}: {error}") from error
        if tuple(card.robot.relative) != tuple(relative):
            raise ConfigError(
                f"{where}: card {card.name!r}: robot.relative is not that of the training data; its loss "
                "would be that of other actions"
            )
        stores.append(store)
    return tuple(stores)


def notices(sets: Sets, robot: Embodiment) -> tuple[str, ...]:
    """Return a sentence for each set whose pictures were made otherwise than those that are trained on."""
    found = []
    for name, stores in sets.items():
        for store in stores:
            shows = f"validation set {name!r} shows"
            found.append(renderer_notice("the policy is trained on", robot, shows, store.embodiment))
    return tuple(dict.fromkeys(notice for notice in found if notice))
