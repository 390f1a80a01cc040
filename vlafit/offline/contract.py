"""Compare an actor's robot, and its statistics, with the dataset before anything is asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlafit import config
from vlafit.agreement import (
    Agreement,
    Item,
    describe_recorded,
    evaluation_items,
    invalid_items,
    recorded_otherwise,
)
from vlafit.codec import Codec
from vlafit.datasets import EpisodeStore, column_order, conversions, value_faults
from vlafit.datasets.framing import exchanged_keys, frames, is_same, learned, said_of_cameras
from vlafit.datasets.recorded_forms import require_forms
from vlafit.errors import EmbodimentError, quoted
from vlafit.recipe import AdaptRecipe, Recipe
from vlafit.requests import expected_of
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
    items = (
        evaluation_items(actor.embodiment, store.embodiment, "dataset") if isinstance(actor, OfRobot) else []
    )
    return items + invalid_items(expected_of(actor, store.embodiment).fate_of_invalid)


def compare_values(
    codec: Codec, store: EpisodeStore, title: str, permitted: Sequence[str] = ()
) -> list[Item]:
    """Compare the values of a dataset with the statistics of a codec, as training does.

    `title` names the checkpoint, `permitted` are dimensions whose values may be extreme. Raises
    EmbodimentError naming every dimension that is extreme and not permitted; DataError as `require_forms`.
    """
    _require_same_forms(codec, store, title)
    every = tuple(info.id for info in store.episodes)
    require_forms(store, every)
    items = tuple(value_faults.items([store], [every], codec, permitted, False, EVALUATION))
    Agreement(items, (), ()).require(f"dataset {store.card.name!r} and the statistics of {title}")
    return list(items)


def _require_same_forms(codec: Codec, store: EpisodeStore, title: str) -> None:
    """Raise EmbodimentError where the card says that poses or grippers are recorded otherwise.

    What is learned of them is the checkpoint's, whatever the card says.
    """
    robot, config = store.card.robot, codec.config
    for name, here, there in (
        ("state", robot.state.form, config.state_form),
        ("action", robot.action.form, config.action_form),
    ):
        if recorded_otherwise(here, there):
            raise EmbodimentError(
                f"dataset {store.card.name!r}: robot.{name} is recorded as {describe_recorded(here)}, and "
                f"{title} learned from {describe_recorded(there)}: it would read other values. If "
                "the files are as the checkpoint's were, correct the card; else convert them"
            )


def compare_cameras(
    store: EpisodeStore,
    title: str,
    checkpoint: Path | None,
    embodiment: str = "",
    confirmed: Sequence[str] = (),
) -> list[Item]:
    """Return the cameras of a dataset whose key has the name of another camera, and why each is right.

    It is if `confirmed` or the `adapt.cameras` of the checkpoint's recipe names it, or the checkpoint learned
    from the same key. Raises EmbodimentError naming every other one, or a `confirmed` that is no camera.
    `title` names the policy; `checkpoint` is None for one that is not here.
    """
    reasons = dict.fromkeys(confirmed, "--confirm-cameras")
    for camera in confirmed:
        try:
            store.embodiment.camera(camera)
        except EmbodimentError as error:
            raise EmbodimentError(f"--confirm-cameras {quoted(camera)}: {error}") from None
    learned_from: set[str] = set()
    if checkpoint is not None:
        mapped = _adapt_of(checkpoint, embodiment).cameras.values()
        reasons |= dict.fromkeys(mapped, "adapt.cameras of the checkpoint's recipe")
        learned_from = said_of_cameras(checkpoint)
    exchanged = exchanged_keys(store.card)
    for camera, text in exchanged.items():
        if text in learned_from:
            reasons.setdefault(camera, "the checkpoint learned from the same key")
    listed = " ".join(camera for camera in exchanged if camera not in reasons)
    fix = f"correct the card; if it is right, add --confirm-cameras {listed}"
    items = [
        Item(f"camera {camera}", {"dataset": text}, "as it is", "chosen", reasons[camera])
        if camera in reasons
        else Item(f"camera {camera}", {"dataset": text}, "", "conflict", fix=fix)
        for camera, text in exchanged.items()
    ]
    Agreement(tuple(items), (), ()).require(f"the cameras of dataset {store.card.name!r} and {title}")
    return items


def compare_frames(checkpoint: Path, store: EpisodeStore, embodiment: str = "") -> Iterator[Item]:
    """Yield how the dataset's frames are read, and those a checkpoint learned from, where it says."""
    stated, here = learned(checkpoint, embodiment), frames(store.card)
    if stated and is_same(here, stated):
        yield Item("frames", {"dataset": here, "checkpoint": stated}, here, "same")
    elif stated:
        sides = {"dataset": here, "checkpoint": stated}
        yield Item("frames", sides, here, "differs", "are all upright?")


def compare_columns(checkpoint: Path, store: EpisodeStore, robot: Embodiment) -> list[Item]:
    """Return from which columns states and actions are read, and those that a checkpoint learned from.

    Raises EmbodimentError where they are in another order, and no names tell which is which.
    """
    items = tuple(column_order.items([store.card], checkpoint, robot, robot.name, fix=column_order.FIX_HERE))
    Agreement(items, (), ()).require(f"the columns of dataset {store.card.name!r} and {checkpoint}")
    computed = conversions.items([store.card], checkpoint, robot.name, is_refused=False)
    return [*items, *(item for item in computed if "checkpoint" in item.sides)]


def permitted_by(checkpoint: Path, embodiment: str = "") -> tuple[str, ...]:
    """Return the dimensions of an embodiment that the recipe of a run's checkpoint permits to be extreme."""
    return _adapt_of(checkpoint, embodiment).outside


def _adapt_of(checkpoint: Path, embodiment: str) -> AdaptRecipe:
    """Return the `[adapt]` section of a run's checkpoint for an embodiment; an empty one without a recipe."""
    path = checkpoint / "recipe.toml"
    return config.read(Recipe, path, "recipe").adapt.of(embodiment) if path.is_file() else AdaptRecipe()
