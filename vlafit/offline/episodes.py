"""Which episodes a policy is evaluated on: those of a dataset that it has not learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlafit import checkpoints, config
from vlafit.checkpoints import Lineage
from vlafit.datasets import EpisodeStore, episodes_hash, split_episodes
from vlafit.datasets.content import recognise
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe

HELD_OUT = "Held out from training (data.validation)."


@dataclass(frozen=True)
class Episodes:
    """Episodes to evaluate on, and those that the policy learned from."""

    evaluated: tuple[str, ...]
    training: tuple[str, ...]
    """Empty where the policy did not learn from this dataset, or nobody knows."""
    why: str
    """How they were chosen, as a sentence for the report."""

    @property
    def learned(self) -> bool:
        """Whether an evaluated episode is among those that the policy learned from."""
        return bool(set(self.evaluated) & set(self.training))


@dataclass(frozen=True)
class Seen:
    """What is known about a policy and the episodes of a dataset."""

    training: tuple[str, ...] = ()
    """Episodes that it learned from, in this dataset or in another file."""
    held_out: tuple[str, ...] | None = None
    """Episodes that its run held out; None where its run did not train on this dataset."""
    doubt: str = ""
    """Why it may have learned from further episodes; empty: it did not."""
    fault: str = ""
    """Why no episodes can be chosen."""


def choose_episodes(store: EpisodeStore, checkpoint: Path | None, wanted: Sequence[str] = ()) -> Episodes:
    """Return the episodes of `store` to evaluate the policy of `checkpoint` on (None: its origin is unknown).

    Without `wanted`, they are those that neither its run nor those before learned from, recognised by their
    states or actions. Raises ConfigError where none is left or the dataset has changed since, and DataError
    for an episode that does not exist.
    """
    for identity in wanted:
        store.index(identity)
    every = tuple(info.id for info in store.episodes)
    seen = _seen(store, checkpoint)
    if wanted:
        chosen = tuple(dict.fromkeys(wanted))
        return Episodes(chosen, seen.training, f"Named on the command line; {_learned_from(chosen, seen)}.")
    if seen.fault:
        raise ConfigError(f"{seen.fault}; name the episodes to evaluate on: --episodes {every[0]} ...")
    candidates = every if seen.held_out is None else seen.held_out
    left = tuple(identity for identity in candidates if identity not in seen.training)
    if not left:
        none_held_out = " (data.validation = 0)" if seen.held_out == () else ""
        raise ConfigError(
            f"dataset {store.card.name!r}: the policy learned from all its episodes{none_held_out}, "
            f"so none shows what it learned; use another dataset, or name episodes: --episodes {every[0]} ..."
        )
    if seen.held_out is not None:
        return Episodes(left, seen.training, HELD_OUT)
    if seen.training:
        why = (
            f"{len(left)} of the dataset's {len(every)} episodes: the policy learned from the others, which "
            "are recognised by their states or actions."
        )
    elif seen.doubt:
        why = "All of the dataset."
    else:
        why = "All of the dataset: the policy learned from no episode with these states or actions."
    doubt = f" Whether the policy learned from them is not known: {seen.doubt}." if seen.doubt else ""
    return Episodes(left, seen.training, why + doubt)


def _learned_from(chosen: Sequence[str], seen: Seen) -> str:
    """Return from how many of the `chosen` episodes the policy learned, as far as it is known."""
    among = sum(identity in seen.training for identity in chosen)
    if among == len(chosen) or seen.held_out is not None or not seen.doubt:
        return f"the policy learned from {among} of them"
    if among:
        return f"the policy learned from {among} of them, and whether from the others is not known"
    return "whether the policy learned from them is not known"


def _seen(store: EpisodeStore, checkpoint: Path | None) -> Seen:
    lineage = Lineage() if checkpoint is None else checkpoints.read_lineage(checkpoint)
    recognised = recognise(store, frozenset(lineage.episodes)) if lineage.episodes else ()
    split = _split(store, checkpoint, lineage)
    if split is not None:
        training, held_out = split
        return Seen(tuple(dict.fromkeys((*training, *recognised))), held_out)
    unsaid = "the server does not say what its policy learned from"
    if checkpoint is not None:
        unsaid = "the checkpoint does not say what it learned from"
    doubt = "" if lineage.complete else unsaid
    if doubt and lineage.datasets:
        doubt = (
            "its history does not name every episode that it, or the checkpoint it began with, learned from"
        )
    name = store.card.name
    if not recognised and any(dataset.card == name for dataset in lineage.datasets):
        changed = f"dataset {name!r}: the policy learned from one of this name, with other rows or episodes"
        return Seen(doubt=doubt or "rows changed", fault=changed)
    return Seen(recognised, doubt=doubt)


def _split(
    store: EpisodeStore, checkpoint: Path | None, lineage: Lineage
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return (training, held out) if the run of the checkpoint trained on this dataset as it is."""
    if checkpoint is None or not lineage.datasets or not (checkpoint / "recipe.toml").is_file():
        return None
    recipe = config.read(Recipe, checkpoint / "recipe.toml", "recipe")
    data, seed = recipe.data, recipe.train.seed
    split = split_episodes(store, data.validation, seed, data.episodes_per_task)
    digest = episodes_hash(store, *split)
    return split if any(dataset.sha256 == digest for dataset in lineage.datasets) else None
