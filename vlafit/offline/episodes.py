"""Which episodes a policy is evaluated on: those of a dataset that it has not learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlafit import checkpoints, config
from vlafit.datasets import EpisodeStore, episodes_hash, split_episodes
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe


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


def choose_episodes(store: EpisodeStore, checkpoint: Path | None, wanted: Sequence[str] = ()) -> Episodes:
    """Return the episodes of `store` to evaluate the policy of `checkpoint` on (None: its origin is unknown).

    Without `wanted`, they are those that training held out, or all if the policy learned from other data.
    Raises ConfigError where none was held out or the dataset has changed since, and DataError for an episode
    that does not exist.
    """
    for identity in wanted:
        store.index(identity)
    every = tuple(info.id for info in store.episodes)
    chosen = tuple(dict.fromkeys(wanted))
    split, fault = _split(store, checkpoint)
    if chosen:
        training = split[0] if split else ()
        among = sum(identity in training for identity in chosen)
        why = f"Named on the command line; the policy learned from {among} of them." if split else (
            "Named on the command line; whether the policy learned from them is not known."
        )  # fmt: skip
        return Episodes(chosen, training, why)
    if fault:
        raise ConfigError(f"{fault}; name the episodes to evaluate on: --episodes {every[0]} ...")
    if split is None:
        known = checkpoint is not None and bool(checkpoints.read_lineage(checkpoint).datasets)
        why = "All of the dataset: the policy learned from others." if known else (
            "All of the dataset: the checkpoint does not say what it learned from."
        )  # fmt: skip
        return Episodes(every, (), why)
    training, held_out = split
    if not held_out:
        raise ConfigError(
            f"dataset {store.card.name!r}: the policy learned from all its episodes (data.validation = 0), "
            f"so none shows what it learned; use another dataset, or name episodes: --episodes {every[0]} ..."
        )
    return Episodes(held_out, training, "Held out from training (data.validation).")


def _split(
    store: EpisodeStore, checkpoint: Path | None
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]] | None, str]:
    """Return (training, held out) if the checkpoint learned from this dataset, and what is wrong about it."""
    if checkpoint is None or not (checkpoint / "recipe.toml").is_file():
        return None, ""
    learned = {dataset.card: dataset.sha256 for dataset in checkpoints.read_lineage(checkpoint).datasets}
    if not learned:
        return None, ""
    recipe = config.read(Recipe, checkpoint / "recipe.toml", "recipe")
    data, seed = recipe.data, recipe.train.seed
    split = split_episodes(store, data.validation, seed, data.episodes_per_task)
    if episodes_hash(store, *split) in learned.values():
        return split, ""
    name = store.card.name
    if name in learned:
        return (
            None,
            f"dataset {name!r}: the policy learned from one of this name, with other rows or episodes",
        )
    return None, ""
