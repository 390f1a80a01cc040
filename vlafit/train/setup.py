"""What a recipe asks for, made: datasets, policy, codec, tuning plan. Nothing here trains or writes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlafit import checkpoints, shipped
from vlafit.codec import Codec, CodecConfig, Encoded, prompts
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.datasets import (
    Card,
    ChunkDataset,
    EpisodeStore,
    SampleOrder,
    arrays_for_statistics,
    load_card,
    open_dataset,
    shift_images,
    split_episodes,
)
from vlafit.errors import ConfigError, DataError
from vlafit.nn.batch import Batch, stack
from vlafit.nn.policy import Policy
from vlafit.policies import build_family
from vlafit.recipe import DataRecipe, PolicyRecipe, Recipe
from vlafit.train.loop import Keys
from vlafit.tuning import Plan, apply, load_strategy
from vlafit.types import Embodiment, require_same

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Experiment:
    """All that a recipe describes."""

    recipe: Recipe
    policy: Policy
    codec: Codec
    plan: Plan
    data: Data
    load_report: str


def open_data(recipe: DataRecipe, seed: int) -> Data:
    """Open the recipe's datasets and split each by episode. Raises DataError when nothing is left to train on."""
    if not recipe.cards:
        raise ConfigError(
            "data.cards is empty; name at least one data card (`vlafit list` shows those that ship)"
        )
    cards = tuple(load_card(name) for name in recipe.cards)
    stores = tuple(open_dataset(card) for card in cards)
    for card, store in zip(cards[1:], stores[1:], strict=True):
        require_same(store.embodiment, f"card {card.name!r}", stores[0].embodiment, f"card {cards[0].name!r}")
    splits = [split_episodes(store, recipe.validation, seed, recipe.episodes_per_task) for store in stores]
    if not any(training for training, _ in splits):
        raise DataError(f"no training episodes are left in {', '.join(recipe.cards)}; lower data.validation")
    return Data(cards, stores, tuple(s[0] for s in splits), tuple(s[1] for s in splits))


def build(recipe: Recipe, device: torch.device, data: Data | None = None) -> Experiment:
    """Make everything of a recipe; the policy is in fp32 on `device`, its strategy applied."""
    data = data or open_data(recipe.data, recipe.train.seed)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    if recipe.policy.checkpoint:
        loaded = checkpoints.load(
            shipped.find("checkpoint", recipe.policy.checkpoint),
            config=recipe.policy.config or None,
            fresh=recipe.policy.fresh,
            generator=generator,
        )
        policy, codec, report = loaded.policy, loaded.codec, loaded.report.text()
    else:
        policy, codec, report = _from_scratch(recipe.policy, generator), None, "all weights are fresh"
    if codec is None or recipe.data.statistics == "data":
        codec = fit_codec(recipe, policy, data, codec)
    require_same(data.embodiment, "the dataset", codec.embodiment, "the checkpoint")
    policy.to(device)
    plan = apply(policy, load_strategy(recipe.strategy))
    return Experiment(recipe, policy, codec, plan, data, report)


def _from_scratch(recipe: PolicyRecipe, generator: torch.Generator) -> Policy:
    if not recipe.family:
        raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
    return build_family(recipe.family, recipe.size, recipe.config, generator)


def fit_codec(recipe: Recipe, policy: Policy, data: Data, old: Codec | None) -> Codec:
    """Fit a codec's statistics to the training episodes; tokenizer and form come from `old` where there is one."""
    if old is not None:
        config, tokenizer = old.config, old.tokenizer
    else:
        needs = policy.needs()
        if recipe.policy.tokenizer:
            tokenizer = load_tokenizer(shipped.find("tokenizer", recipe.policy.tokenizer))
        else:
            words = [*data.instructions(), *prompts.vocabulary(needs.prompt)]
            tokenizer = train_word_tokenizer(words, needs.vocabulary)
        config = CodecConfig(
            cameras=tuple(camera.name for camera in data.embodiment.cameras),
            image_size=needs.image_size,
            state_dim=needs.state_dim,
            action_dim=needs.action_dim,
            chunk=needs.chunk,
            normalisation=recipe.data.normalisation,
            relative=data.cards[0].robot.relative,
            prompt=needs.prompt,
            max_tokens=needs.max_tokens,
        )
    arrays = [
        arrays_for_statistics(store, ids, config.chunk, config.relative)
        for store, ids in zip(data.stores, data.training, strict=True)
        if ids
    ]
    states, actions = (np.concatenate(columns) for columns in zip(*arrays, strict=True))
    return Codec.fit(config, data.embodiment, states, actions, tokenizer)


class EncodedSamples(Dataset[tuple[tuple[int, int], Encoded]]):
    """Samples by (epoch, index): read, augmented, encoded; what a loader's worker does."""

    def __init__(self, chunks: ChunkDataset, codec: Codec, shift_pixels: int, seed: int) -> None:
        self.chunks, self.codec, self.shift_pixels, self.seed = chunks, codec, shift_pixels, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], Encoded]:
        sample = self.chunks[key[1]]
        if self.shift_pixels:
            sample = shift_images(sample, self.shift_pixels, seed=self.seed, epoch=key[0], index=key[1])
        return key, self.codec.encode(sample)

    def __len__(self) -> int:
        return len(self.chunks)


def _collate(rows: Sequence[tuple[tuple[int, int], Encoded]]) -> tuple[Keys, Batch]:
    return [key for key, _ in rows], stack([encoded for _, encoded in rows])


def rows_of(
    batch: Sequence[tuple[int, int]], accumulate: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """Return this process's micro-batches of a global batch: every process gets equally many rows."""
    size, rest = divmod(len(batch), accumulate * world)
    if rest or not size:
        raise ConfigError(
            f"train.batch_size {len(batch)} is not a multiple of train.accumulate {accumulate} x processes {world}; "
            f"take {accumulate * world * max(1, round(len(batch) / (accumulate * world)))}"
        )
    return [list(batch[(m * world + rank) * size :][:size]) for m in range(accumulate)]


def training_batches(
    experiment: Experiment, *, first_step: int, rank: int, world: int
) -> Iterator[list[tuple[Keys, Batch]]]:
    """Yield this process's micro-batches of optimiser step `first_step`, `first_step` + 1, ...

    The order is a function of seed and step alone, so going on after an interruption needs no loader state.
    """
    recipe = experiment.recipe
    data = experiment.data
    chunks = ChunkDataset(data.stores, experiment.codec.config.chunk, data.training)
    samples = EncodedSamples(chunks, experiment.codec, recipe.data.shift_pixels, recipe.train.seed)
    order = SampleOrder(len(chunks), recipe.train.seed)
    accumulate = recipe.train.accumulate
    wanted = (
        rows
        for step in range(first_step, recipe.train.steps)
        for rows in rows_of(order.batch(step, recipe.train.batch_size), accumulate, rank, world)
    )
    rows_of(
        order.batch(0, recipe.train.batch_size), accumulate, rank, world
    )  # refuse a bad size before the first step
    loader = DataLoader(
        samples,
        batch_sampler=_Rows(wanted),
        num_workers=recipe.data.workers,
        collate_fn=_collate,
        multiprocessing_context="spawn" if recipe.data.workers else None,
    )

    def steps() -> Iterator[list[tuple[Keys, Batch]]]:
        stream = iter(loader)
        for _ in range(first_step, recipe.train.steps):
            yield [next(stream) for _ in range(accumulate)]

    return steps()


class _Rows:
    """An iterable of batches of keys that a DataLoader takes as its batch sampler."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches


def validation_batches(experiment: Experiment, *, rank: int, world: int) -> list[tuple[Keys, Batch]]:
    """Return this process's share of the validation samples, evenly spread over the held-out episodes.

    The same samples whatever the number of processes, and equally many batches on each.
    """
    recipe, data = experiment.recipe, experiment.data
    if not any(data.validation):
        return []
    chunks = ChunkDataset(data.stores, experiment.codec.config.chunk, data.validation)
    samples = EncodedSamples(chunks, experiment.codec, 0, 0)
    size = max(1, recipe.train.batch_size // (world * recipe.train.accumulate))
    wanted = min(len(chunks), recipe.train.validation_batches * recipe.train.batch_size)
    batches = max(1, wanted // (size * world))
    chosen = [(0, i * len(chunks) // (batches * world * size)) for i in range(batches * world * size)]
    return [
        _collate([samples[key] for key in chosen[(b * world + rank) * size :][:size]]) for b in range(batches)
    ]
