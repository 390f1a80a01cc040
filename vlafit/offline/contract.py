"""Compare an actor's robot, and its statistics, with the dataset before anything is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlafit import config
from vlafit.agreement import Agreement
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


def require_values(
    codec: Codec, store: EpisodeStore, title: str, permitted: Sequence[str] = ()
) -> tuple[str, ...]:
    """Compare the values of a dataset with the statistics of a codec, as training does.

    `title` names the checkpoint, `permitted` are dimensions whose values may be extreme. Returns a sentence
    for each difference that is no error. Raises EmbodimentError naming every dimension that is.
    """
    every = tuple(info.id for info in store.episodes)
    items = tuple(value_faults.items([store], [every], codec, permitted, False, EVALUATION))
    Agreement(items, (), ()).require(f"dataset {store.card.name!r} and the statistics of {title}")
    lines = (
        f"{item.name}: {'; '.join(item.sides.values())}: {item.reason}"
        for item in items
        if item.status == "differs"
    )
    return (*lines, *(f"{text}: are the cameras exchanged?" for text in exchanged_keys(store.card).values()))


def frames_notice(checkpoint: Path, store: EpisodeStore, embodiment: str = "") -> str:
    """Return a sentence where a dataset's frames are read otherwise than those a checkpoint learned from.

    It is "" where they are read alike, or the checkpoint has no agreement that says how its frames were read.
    """
    stated = learned(checkpoint, embodiment)
    here = frames(store.card)
    if not stated or is_same(here, stated):
        return ""
    return (
        f"frames of dataset {store.card.name!r} are read {here}, those that the checkpoint learned from "
        f"{stated}: are all upright?"
    )


def permitted_by(checkpoint: Path, embodiment: str = "") -> tuple[str, ...]:
    """Return the dimensions of an embodiment that the recipe of a run's checkpoint permits to be extreme."""
    path = checkpoint / "recipe.toml"
    return config.read(Recipe, path, "recipe").adapt.of(embodiment).outside if path.is_file() else ()
