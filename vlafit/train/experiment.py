"""What a recipe asks for, made: datasets, policy, codec, tuning plan. Nothing here trains or writes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlafit import checkpoints
from vlafit.codec import Codec
from vlafit.datasets import Card, EpisodeStore, load_card, open_dataset, split_episodes
from vlafit.errors import CodecError, ConfigError, DataError, EmbodimentError, TrainingError
from vlafit.nn.policy import Policy
from vlafit.recipe import DataRecipe, Recipe
from vlafit.train import initial_policy as start
from vlafit.train import quantised_base as own_base
from vlafit.train import validation_sets as sets
from vlafit.train.fingerprint import episodes_hash
from vlafit.tuning import Plan, apply, enter, load_strategy
from vlafit.types import Embodiment, Observation, renderer_notice, require_same


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
        """Whether every episode tells its seed, so that evaluations can be kept away from them."""
        return all(e.seed is not None for store in self.stores for e in store.episodes)

    @cached_property
    def learned(self) -> tuple[checkpoints.Learned, ...]:
        """What each dataset is: episodes and frames to train on, and a hash that tells it from another.

        The hash covers which episodes train and validate, their states, actions and instructions. It leaves
        out the pictures, which would have to be read whole.
        """
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
        """Return a hash of all datasets together."""
        return hashlib.sha256(
            json.dumps([[one.card, one.sha256] for one in self.learned]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Experiment:
    """All that a recipe describes."""

    recipe: Recipe
    policy: Policy
    codec: Codec
    plan: Plan
    data: Data
    load_report: str
    history: checkpoints.Lineage
    notices: tuple[str, ...] = ()
    """What a reader must know before believing the run's numbers."""
    base: checkpoints.Base | None = None
    """The checkpoint that the run began from, where adapters can be saved on top of it."""
    anew: frozenset[str] = frozenset()
    """Weights that were not taken from `base` as they are."""
    validation_sets: sets.Sets = field(default_factory=dict)
    """Named datasets to validate on besides the held-out episodes."""
    unrounded: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights as they were before the strategy rounded them, where they lie in no file; see `own_base`."""

    def saved_on(self, plan: Plan) -> tuple[checkpoints.Base | None, frozenset[str] | None]:
        """Return the base of the run's checkpoints in the stage of `plan`, and which weights differ from it.

        Only runs with adapters or quantised weights are saved on a base; others hold every weight.
        """
        if self.base is None or not (plan.adapted or plan.quantised):
            return None, None
        stages = [plan.at(stage) for stage in range(plan.stage + 1)]
        learned = {e.name for one in stages for e in one.entries if e.trainable and not e.adapts}
        return self.base, self.anew | learned


def open_data(recipe: DataRecipe, seed: int) -> Data:
    """Open the recipe's datasets and split each by episode.

    Raises DataError, ConfigError or EmbodimentError where a dataset is not what its card says, or the cards
    do not show one robot.
    """
    if not recipe.cards:
        raise ConfigError(
            "data.cards is empty; name at least one data card (`vlafit list` shows those that ship)"
        )
    cards = tuple(load_card(name) for name in recipe.cards)
    names = [card.name for card in cards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.cards: {names.count(name)} cards are called {name!r}, and their samples could not be "
                "told apart; name each dataset once, or give the other another name"
            )
    stores = tuple(open_dataset(card) for card in cards)
    for card, store in zip(cards[1:], stores[1:], strict=True):
        require_same(store.embodiment, f"card {card.name!r}", stores[0].embodiment, f"card {cards[0].name!r}")
        if card.robot.relative != cards[0].robot.relative:
            raise ConfigError(
                f"card {card.name!r}: robot.relative is not that of card {cards[0].name!r}; one policy "
                "cannot learn both"
            )
    splits = [split_episodes(store, recipe.validation, seed, recipe.episodes_per_task) for store in stores]
    if not any(training for training, _ in splits):
        raise DataError(f"no training episodes are left in {', '.join(recipe.cards)}; lower data.validation")
    return Data(cards, stores, tuple(s[0] for s in splits), tuple(s[1] for s in splits))


def build(recipe: Recipe, device: torch.device, resumed: Path | None = None) -> Experiment:
    """Make everything of a recipe; the policy is in fp32 on `device`, its strategy applied.

    `resumed` is the checkpoint of the same run to go on from: policy and codec are then those it holds.
    """
    data = open_data(recipe.data, recipe.train.seed)
    more = sets.open_sets(recipe.data, data.embodiment, data.cards[0].robot.relative)
    _require_room_to_shift(recipe.data.shift_pixels, data.embodiment)
    began = start.resume(resumed) if resumed is not None else start.begin(recipe, data)
    policy, codec = began.policy, began.codec
    _require_one_robot(data, codec, began.source, resumed)
    learned = began.learned or codec.embodiment
    notice = renderer_notice("the checkpoint was trained on", learned, "the dataset shows", data.embodiment)
    codec = _of_these_pictures(codec, data.embodiment)
    _require_room_for_prompts([*data.stores, *(store for stores in more.values() for store in stores)], codec)
    policy.to(device)
    strategy, notices, kept = load_strategy(recipe.strategy), began.notices, {}
    if began.plan is None:
        kept = own_base.weights_to_keep(policy, strategy, began.base, began.anew)
        notices += (own_base.NOTICE,) if kept else ()
        probe = start.probe(policy, codec, data, device)
        plan = apply(policy, strategy, seed=recipe.train.seed, probe=probe)
    else:
        plan = began.plan
        if strategy.expand(policy.parts()) != plan.strategy:
            raise TrainingError(
                f"{resumed}: strategy {recipe.strategy!r} is not what it was when the run began; bring its "
                "file back, or start anew with --out"
            )
        enter(policy, plan)
    notices = (*notices, *((notice,) if notice else ()), *sets.notices(more, data.embodiment))
    return Experiment(
        recipe,
        policy,
        codec,
        plan,
        data,
        began.report,
        began.history,
        notices,
        began.base,
        began.anew,
        more,
        kept,
    )


def _require_room_to_shift(pixels: int, robot: Embodiment) -> None:
    for camera in robot.cameras:
        height, width, _ = camera.shape
        if pixels >= min(height, width):
            raise ConfigError(
                f"data.shift_pixels {pixels} would move all of camera {camera.name!r}, {height}x{width}, "
                "out of sight; take a few pixels, or 0 for none"
            )


def _require_one_robot(data: Data, codec: Codec, source: str, resumed: Path | None) -> None:
    try:
        require_same(data.embodiment, f"card {data.cards[0].name!r}", codec.embodiment, source)
    except EmbodimentError as error:
        if resumed is not None:
            raise
        way_out = 'To teach the checkpoint this robot, fit its codec anew: data.statistics = "data".'
        raise EmbodimentError(f"{error}\n{way_out}") from error


def _of_these_pictures(codec: Codec, data: Embodiment) -> Codec:
    """Return the codec of a policy that learns from the dataset's pictures, whose renderer it then knows."""
    if not data.renderer or data.renderer == codec.embodiment.renderer:
        return codec
    robot = replace(codec.embodiment, renderer=data.renderer)
    return Codec(codec.config, robot, codec.statistics, codec.tokenizer)


def _require_room_for_prompts(stores: Sequence[EpisodeStore], codec: Codec) -> None:
    """Encode each instruction once, so that one that is too long is refused now and not days later."""
    images = {camera.name: np.zeros(camera.shape, np.uint8) for camera in stores[0].embodiment.cameras}
    told: set[str] = set()
    for store in stores:
        for number, episode in enumerate(store.episodes):
            if episode.instruction not in told:
                told.add(episode.instruction)
                try:
                    codec.encode(Observation(images, store.state(number)[0], episode.instruction))
                except CodecError as error:
                    raise CodecError(f"card {store.card.name!r}, episode {episode.id}: {error}") from error
