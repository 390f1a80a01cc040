"""Compare an actor's robot, and its statistics, with the dataset before anything is asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlafit import config
from vlafit.agreement import Agreement, Item, evaluation_items
from vlafit.codec import Codec
from vlafit.datasets import EpisodeStore, value_faults
from vlafit.datasets.framing import exchanged_keys, frames, is_same, learned
from vlafit.recipe import Recipe
from vlafit.types import Actor, Embodiment, require_same


@runtime_checkable
class OfRobot(Protocol):
    """An actor that knows its robot and what decides its actions."""

    embodiment: Embodiment

    def fingerprint(self) -> str:
        """Return all that decides its actions."""
        ...


def require_robot(actor: Actor, store: EpisodeStore) -> str:
    """Return what identifies the actor. Raises EmbodimentError if it was trained on another robot."""
    if not isinstance(actor, OfRobot):
        return type(actor).__name__
    require_same(actor.embodiment, "the policy", store.embodiment, f"dataset {store.card.name!r}")
    return actor.fingerprint()


EVALUATION = value_faults.Remedies(
    refit="Else train on data of this robot",
    permit="if such values are meant: --outside {}",
    quote="",
    chosen="--outside",
)


def agree(actor: Actor, store: EpisodeStore) -> list[Item]:
    """Return what the actor's robot and that of the dataset, which `require_robot` has let pass, say of each
    other."""
    return (
        evaluation_items(actor.embodiment, store.embodiment, "dataset") if isinstance(actor, OfRobot) else []
    )


def compare_values(
    codec: Codec, store: EpisodeStore, title: str, permitted: Sequence[str] = ()
) -> list[Item]:
    """Compare the values of a dataset with the statistics of a codec, as training does.

    `title` names the checkpoint, `permitted` are dimensions whose values may be extreme. Raises
    EmbodimentError naming every dimension that is extreme and not permitted.
    """
    every = tuple(info.id for info in store.episodes)
    items = tuple(value_faults.items([store], [every], codec, permitted, False, EVALUATION))
    Agreement(items, (), ()).require(f"dataset {store.card.name!r} and the statistics of {title}")
    return [*items, *_exchanged(store)]


def _exchanged(store: EpisodeStore) -> Iterator[Item]:
    for camera, text in exchanged_keys(store.card).items():
        yield Item(f"camera {camera}", {"dataset": text}, "as it is", "differs", "are the cameras exchanged?")


def compare_frames(checkpoint: Path, store: EpisodeStore, embodiment: str = "") -> Iterator[Item]:
    """Yield how the dataset's frames are read, and those a checkpoint learned from, where it says."""
    stated, here = learned(checkpoint, embodiment), frames(store.card)
    if stated and is_same(here, stated):
        yield Item("frames", {"dataset": here, "checkpoint": stated}, here, "same")
    elif stated:
        sides = {"dataset": here, "checkpoint": stated}
        yield Item("frames", sides, here, "differs", "are all upright?")


def permitted_by(checkpoint: Path, embodiment: str = "") -> tuple[str, ...]:
    """Return the dimensions of an embodiment that the recipe of a run's checkpoint permits to be extreme."""
    path = checkpoint / "recipe.toml"
    return config.read(Recipe, path, "recipe").adapt.of(embodiment).outside if path.is_file() else ()
