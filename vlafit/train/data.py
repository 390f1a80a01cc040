"""Open a recipe's datasets: training and held-out episodes, and named validation sets.

The held-out episodes measure how well the new task is learned; a validation set (`data.validation_sets`), for
example a sample of what the checkpoint was pretrained on, measures what is forgotten meanwhile. Validation
sets are whole datasets that are never trained on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from vlafit import checkpoints
from vlafit.datasets import Card, EpisodeStore, episodes_hash, load_card, open_dataset, split_episodes
from vlafit.datasets.card import with_relative_matches
from vlafit.datasets.leaks import require_apart
from vlafit.errors import ConfigError, DataError, EmbodimentError
from vlafit.recipe import DataRecipe
from vlafit.types import Embodiment, renderer_notice, require_same

ValidationSets = Mapping[str, tuple[EpisodeStore, ...]]


@dataclass(frozen=True)
class Data:
    """The demonstrations of a run, opened and split by episode."""

    cards: tuple[Card, ...]
    stores: tuple[EpisodeStore, ...]
    training: tuple[tuple[str, ...], ...]  # episode ids of each store
    validation: tuple[tuple[str, ...], ...]

    @property
    def embodiment(self) -> Embodiment:
        return self.stores[0].embodiment

    def instructions(self) -> list[str]:
        """Return each instruction once, in order."""
        return list(dict.fromkeys(e.instruction for store in self.stores for e in store.episodes))

    def seeds(self) -> dict[str, set[int]]:
        """Return the recorded seeds of each task, which no evaluation may start from."""
        seeds: dict[str, set[int]] = {}
        for episode in (e for store in self.stores for e in store.episodes if e.seed is not None):
            assert episode.seed is not None
            seeds.setdefault(episode.task, set()).add(episode.seed)
        return seeds

    @property
    def seeds_known(self) -> bool:
        """Whether every episode records its seed, so that evaluations can avoid it."""
        return all(e.seed is not None for store in self.stores for e in store.episodes)

    def left_out(self) -> dict[str, dict[str, str]]:
        """Return the episodes that each card leaves out, and why; only cards that leave some out."""
        return {
            card.name: {left.id: left.reason for left in store.left_out}
            for card, store in zip(self.cards, self.stores, strict=True)
            if store.left_out
        }

    @cached_property
    def learned(self) -> tuple[checkpoints.Learned, ...]:
        """Name, hash and size of each dataset that is trained on; see `episodes_hash`."""
        return tuple(
            checkpoints.Learned(
                card=store.card.name,
                sha256=episodes_hash(store, training, validation),
                episodes=len(training),
                frames=sum(store.episodes[store.index(i)].length for i in training),
            )
            for store, training, validation in zip(self.stores, self.training, self.validation, strict=True)
        )

    @property
    def fingerprint(self) -> str:
        """Hash of all datasets together."""
        datasets = [[dataset.card, dataset.sha256] for dataset in self.learned]
        return hashlib.sha256(json.dumps(datasets).encode()).hexdigest()


def open_data(recipe: DataRecipe, seed: int) -> Data:
    """Open the recipe's datasets and split each by episode.

    Raises DataError, ConfigError or EmbodimentError where a dataset does not match its card, or the cards
    describe different robots.
    """
    if not recipe.cards:
        raise ConfigError(
            "data.cards is empty; name at least one data card (`vlafit list` shows the shipped ones)"
        )
    cards = tuple(_card(name, recipe) for name in recipe.cards)
    names = [card.name for card in cards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.cards: {names.count(name)} cards are called {name!r}, so their samples cannot be told "
                "apart; list each dataset once, or rename one card"
            )
    stores = tuple(open_dataset(card) for card in cards)
    for card, store in zip(cards[1:], stores[1:], strict=True):
        require_same(store.embodiment, f"card {card.name!r}", stores[0].embodiment, f"card {cards[0].name!r}")
        if card.robot.relative != cards[0].robot.relative:
            raise ConfigError(
                f"card {card.name!r}: robot.relative differs from card {cards[0].name!r}; one policy cannot "
                "learn both"
            )
    splits = [split_episodes(store, recipe.validation, seed, recipe.episodes_per_task) for store in stores]
    names = [f"card {card.name!r}" for card in cards]
    require_apart(
        [(name, store, split[0]) for name, store, split in zip(names, stores, splits, strict=True)],
        [(name, store, split[1]) for name, store, split in zip(names, stores, splits, strict=True)],
    )
    if not any(training for training, _ in splits):
        raise DataError(f"no training episodes are left in {', '.join(recipe.cards)}; lower data.validation")
    return Data(cards, stores, tuple(s[0] for s in splits), tuple(s[1] for s in splits))


def _card(name: str, recipe: DataRecipe) -> Card:
    """Load a card, with the relative actions that the recipe asks for."""
    card = load_card(name)
    return with_relative_matches(card) if recipe.relative == "matching" else card


# ----------------------------------------------------------------------------------------- validation sets


def cards_of(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the cards of one entry of `data.validation_sets`, which may be a single name."""
    return (value,) if isinstance(value, str) else value


def open_validation_sets(recipe: DataRecipe, data: Data) -> ValidationSets:
    """Open every named validation set, and compare its robot and its episodes with the training data.

    Raises ConfigError, DataError or EmbodimentError naming the set.
    """
    robot, relative = data.embodiment, data.cards[0].robot.relative
    sets = {
        name: tuple(_open_set(f"data.validation_sets.{name}", recipe, cards_of(cards), robot, relative))
        for name, cards in recipe.validation_sets.items()
    }
    require_apart(
        [
            (f"card {card.name!r}", store, ids)
            for card, store, ids in zip(data.cards, data.stores, data.training, strict=True)
        ],
        [
            (f"data.validation_sets.{name}", store, [info.id for info in store.episodes])
            for name, stores in sets.items()
            for store in stores
        ],
    )
    return sets


def _open_set(
    where: str, recipe: DataRecipe, cards: tuple[str, ...], robot: Embodiment, relative: Sequence[bool]
) -> Iterator[EpisodeStore]:
    if not cards:
        raise ConfigError(f"{where} names no data card; name at least one, or remove the set")
    for name in cards:
        card = _card(name, recipe)
        store = open_dataset(card)
        try:
            require_same(store.embodiment, f"card {card.name!r}", robot, "the training data")
        except EmbodimentError as error:
            raise EmbodimentError(f"{where}: {error}") from error
        if tuple(card.robot.relative) != tuple(relative):
            raise ConfigError(
                f"{where}: card {card.name!r}: robot.relative differs from the training data, so its loss "
                "would be measured on different actions"
            )
        yield store


def renderer_warnings(sets: ValidationSets, robot: Embodiment) -> tuple[str, ...]:
    """Return a sentence for each validation set whose renderer differs from the training data's."""
    warnings = [
        renderer_notice("the policy is trained on", robot, f"validation set {name!r} shows", store.embodiment)
        for name, stores in sets.items()
        for store in stores
    ]
    return tuple(dict.fromkeys(filter(None, warnings)))
