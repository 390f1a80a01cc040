"""Open a recipe's datasets: training and held-out episodes, and named validation sets.

The held-out episodes measure how well the new task is learned; a validation set (`data.validation_sets`), for
example a sample of what the checkpoint was pretrained on, measures what is forgotten meanwhile. Validation
sets are whole datasets that are never trained on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress

from vlafit import checkpoints
from vlafit.datasets import Card, EpisodeStore, episodes_hash, load_card, open_dataset, split_episodes
from vlafit.datasets.checks import check_declared
from vlafit.datasets.content import content_of
from vlafit.datasets.leaks import require_apart, require_once
from vlafit.datasets.recorded_forms import require_forms
from vlafit.datasets.relative import with_relative_matches
from vlafit.datasets.vision_language import VisionLanguageSet, open_set
from vlafit.errors import ConfigError, DataError, EmbodimentError, command_line, did_you_mean
from vlafit.recipe import DataRecipe
from vlafit.train.data_names import require_named
from vlafit.train.statistics_from import describing, different
from vlafit.types import Embodiment, renderer_notice, require_same

ValidationSets = Mapping[str, tuple[EpisodeStore, ...]]


@dataclass(frozen=True)
class Data:
    """The demonstrations of a run, opened and split by episode."""

    cards: tuple[Card, ...]
    stores: tuple[EpisodeStore, ...]
    training: tuple[tuple[str, ...], ...]  # episode ids of each store
    validation: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...] = ()
    """Weight of each store in the order of samples; none: every sample once in an epoch."""
    embodiments: Mapping[str, str] = field(default_factory=dict)
    """Name of a card = name of its embodiment, as the recipe has it; none: all show one robot."""
    statistics: str = "data"
    """The recipe's data.statistics; "file" takes those of the dataset's own file where codecs are fitted."""
    vision_language: tuple[VisionLanguageSet, ...] = ()
    """Questions about images that are mixed in, each set with its weight."""
    described_by: EpisodeStore | None = None
    """Another dataset of the same robot, whose episodes give the statistics (`data.statistics_from`)."""

    @property
    def embodiment(self) -> Embodiment:
        """The robot of all datasets. Raises EmbodimentError where there are several; see `parts`."""
        if len(self.names) > 1:
            raise EmbodimentError(f"the data show several embodiments ({', '.join(self.names)}); name one")
        robot = self.stores[0].embodiment
        return replace(robot, name=self.name_of(self.stores[0])) if self.embodiments else robot

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the embodiments, in the order of the cards."""
        return tuple(dict.fromkeys(self.name_of(store) for store in self.stores))

    def name_of(self, store: EpisodeStore) -> str:
        """Return the embodiment of a store, which may be one of a validation set.

        Raises ConfigError for a card that the recipe gives none.
        """
        if not self.embodiments:
            return self.stores[0].embodiment.name
        name = store.card.name
        if name not in self.embodiments:
            raise ConfigError(
                f"data.embodiments does not name the embodiment of card {name!r}; add "
                f'"{name}" = "..." (of the training data: {", ".join(self.names)})'
            )
        return self.embodiments[name]

    def parts(self) -> dict[str, "Data"]:
        """Return the datasets of each embodiment, by its name."""
        owners = [self.name_of(store) for store in self.stores]
        return {name: self._only([owner == name for owner in owners]) for name in self.names}

    def of(self, embodiment: str) -> "Data":
        """Return the datasets of one embodiment; without a name of the only one.

        Raises ConfigError for one that is not there, and without a name where there are several.
        """
        parts = self.parts()
        if embodiment in parts or (not embodiment and len(parts) == 1):
            return parts[embodiment or self.names[0]]
        listed = ", ".join(parts)
        if not embodiment:
            raise ConfigError(f"the data show {len(parts)} embodiments ({listed}); name one of them")
        raise ConfigError(f"the data show no embodiment {embodiment!r}{did_you_mean(embodiment, parts)}")

    def _only(self, chosen: Sequence[bool]) -> "Data":
        return replace(
            self,
            cards=tuple(compress(self.cards, chosen)),
            stores=tuple(compress(self.stores, chosen)),
            training=tuple(compress(self.training, chosen)),
            validation=tuple(compress(self.validation, chosen)),
            weights=tuple(compress(self.weights, chosen)),
            vision_language=(),
        )

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
        """Name, hash and size of each dataset that is trained on; questions about images have no episodes."""
        return tuple(
            checkpoints.Learned(
                card=store.card.name,
                sha256=episodes_hash(store, training, validation),
                episodes=len(training),
                frames=sum(store.episodes[store.index(i)].length for i in training),
            )
            for store, training, validation in zip(self.stores, self.training, self.validation, strict=True)
        ) + tuple(
            checkpoints.Learned(one.name, one.sha256, episodes=0, frames=len(one.training))
            for one in self.vision_language
        )

    @cached_property
    def contents(self) -> frozenset[str]:
        """Digests by which the training episodes are recognised in other files; see `content_of`."""
        return frozenset(
            digest
            for store, training in zip(self.stores, self.training, strict=True)
            for identity in training
            for digest in content_of(store, store.index(identity))
        )

    @property
    def fingerprint(self) -> str:
        """Hash of all datasets together."""
        datasets = [[dataset.card, dataset.sha256] for dataset in self.learned]
        return hashlib.sha256(json.dumps(datasets).encode()).hexdigest()


def open_data(recipe: DataRecipe, seed: int) -> Data:
    """Open the recipe's datasets and split each by episode.

    Raises DataError, ConfigError or EmbodimentError where a dataset does not match its card, or the cards
    of one embodiment describe different robots.
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
                f"apart; list each dataset once, or rename one card{_made_for(name, cards, recipe.cards)}"
            )
    require_named(recipe, names)
    stores = tuple(open_dataset(card) for card in cards)
    for store in stores:
        _require_frames(store)
    _require_one_robot_each(recipe, cards, stores)
    splits = [split_episodes(store, recipe.validation, seed, recipe.episodes_per_task) for store in stores]
    for store, (training, validation) in zip(stores, splits, strict=True):
        require_forms(store, (*training, *validation))
    names = [f"card {card.name!r}" for card in cards]
    robots = [recipe.embodiments.get(card.name, "") for card in cards]
    chosen = [(name, store, split[0]) for name, store, split in zip(names, stores, splits, strict=True)]
    for robot in dict.fromkeys(robots):
        require_once(compress(chosen, [robot == other for other in robots]))
    require_apart(
        chosen,
        [(name, store, split[1]) for name, store, split in zip(names, stores, splits, strict=True)],
    )
    if not any(training for training, _ in splits):
        raise DataError(f"no training episodes are left in {', '.join(recipe.cards)}; lower data.validation")
    for card, (training, _) in zip(cards, splits, strict=True):
        if not training and (recipe.weights or recipe.embodiments):
            raise DataError(f"card {card.name!r}: no training episodes are left; lower data.validation")
    weights = tuple(recipe.weights[card.name] for card in cards) if recipe.weights else ()
    questions = [
        open_set(name, path, recipe.weights[name], recipe.validation, seed)
        for name, path in recipe.vision_language.items()
    ]
    return Data(
        cards,
        stores,
        tuple(training for training, _ in splits),
        tuple(validation for _, validation in splits),
        weights,
        recipe.embodiments,
        recipe.statistics,
        tuple(questions),
        describing(recipe, _card, cards[0]),
    )


def _made_for(name: str, cards: Sequence[Card], named: Sequence[str]) -> str:
    """Return how the last dataset called `name` gets a card, and with it another name; "" if all have one."""
    without = [place for card, place in zip(cards, named, strict=True) if card.name == name and not card.file]
    if not without:
        return ""
    command = command_line("data", "card", without[-1])
    return (
        f". {without[-1]} has no card and is called by its folder or repository, whatever the revision: run "
        f"{command} > {name}-2.toml, give it another `name` there, and list {name}-2.toml in its place"
    )


def _require_frames(store: EpisodeStore) -> None:
    """Raise DataError naming every camera whose first frame is not what the card says.

    Layouts of pictures and videos only find it out when they read a frame.
    """
    faults = []
    for camera in store.embodiment.cameras if store.episodes else ():
        try:
            store.image(0, 0, camera.name)
        except DataError as error:
            faults.append(str(error))
    store.close()  # worker processes open files of their own
    if faults:
        raise DataError("\n".join(faults))


def _require_one_robot_each(
    recipe: DataRecipe, cards: Sequence[Card], stores: Sequence[EpisodeStore]
) -> None:
    """Raise EmbodimentError or ConfigError where the cards of one embodiment describe different robots."""
    first: dict[str, int] = {}
    for number, (card, store) in enumerate(zip(cards, stores, strict=True)):
        other = first.setdefault(recipe.embodiments.get(card.name, ""), number)
        if other == number:
            continue
        before = f"card {cards[other].name!r}"
        try:
            require_same(store.embodiment, f"card {card.name!r}", stores[other].embodiment, before)
        except EmbodimentError as error:
            raise EmbodimentError(f"{error}\n{_several(recipe, cards)}") from error
        if fault := different(card, cards[other], before):
            raise ConfigError(
                f"card {card.name!r}: {fault}; one policy cannot learn both as one embodiment. "
                f"{_several(recipe, cards)}"
            )


def _several(recipe: DataRecipe, cards: Sequence[Card]) -> str:
    """Return how to train on several robots in one run."""
    robots = [recipe.embodiments.get(card.name, card.robot.name or card.name) for card in cards]
    names = robots if len(set(robots)) > 1 else [card.name for card in cards]
    table = ", ".join(f'"{card.name}" = "{name}"' for card, name in zip(cards, names, strict=True))
    return (
        "If these are several robots, which one policy is to learn, name the embodiment of each card: "
        f"data.embodiments = {{ {table} }}"
    )


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
    sets = {
        name: tuple(_open_set(f"data.validation_sets.{name}", recipe, cards_of(cards), data))
        for name, cards in recipe.validation_sets.items()
    }
    if len(data.names) > 1 and (same := set(sets) & set(data.names)):
        raise ConfigError(
            f"data.validation_sets.{min(same)}: the held-out episodes of embodiment {min(same)!r} are logged "
            "under this name; choose another"
        )
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


def _open_set(where: str, recipe: DataRecipe, cards: tuple[str, ...], data: Data) -> Iterator[EpisodeStore]:
    if not cards:
        raise ConfigError(f"{where} names no data card; name at least one, or remove the set")
    for name in cards:
        card = _card(name, recipe)
        store = open_dataset(card)
        require_forms(store, [info.id for info in store.episodes])
        part = data.of(data.name_of(store))
        robot = part.embodiment
        try:
            require_same(store.embodiment, f"card {card.name!r}", robot, "the training data")
        except EmbodimentError as error:
            raise EmbodimentError(f"{where}: {error}") from error
        if fault := different(card, part.cards[0], "the training data"):
            raise ConfigError(
                f"{where}: card {card.name!r}: {fault}; its loss would be measured on different actions. "
                "Correct the card that is wrong, or remove the set"
            )
        yield store


def declared_warnings(data: Data) -> tuple[str, ...]:
    """Return a sentence for what a dataset's files and card declare, and training does not follow."""
    return tuple(
        f"dataset {store.card.name!r}: {finding.message}; {finding.effect}. To change it, {finding.fix}"
        for store in data.stores
        for finding in check_declared(store)
    )


def renderer_warnings(sets: ValidationSets, data: Data) -> tuple[str, ...]:
    """Return a sentence for each validation set whose renderer differs from the training data's."""
    warnings = [
        renderer_notice(
            "the policy is trained on",
            data.of(data.name_of(store)).embodiment,
            f"validation set {name!r} shows",
            store.embodiment,
        )
        for name, stores in sets.items()
        for store in stores
    ]
    return tuple(dict.fromkeys(filter(None, warnings)))
