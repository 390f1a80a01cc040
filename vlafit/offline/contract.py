"""Compare an actor's robot, its data and its statistics with the dataset before anything is asked."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlafit import config
from vlafit.agreement import (
    UNSAID,
    Agreement,
    Consent,
    Item,
    Learned,
    describe_mask,
    describe_recorded,
    evaluation_items,
    invalid_items,
    recorded_otherwise,
    same_actions,
)
from vlafit.codec import Codec
from vlafit.datasets import EpisodeStore, camera_keys, column_order, conversions, framing, value_faults
from vlafit.datasets.recorded_forms import require_forms
from vlafit.errors import EmbodimentError, quoted
from vlafit.recipe import AdaptRecipe, Recipe
from vlafit.requests import expected_of
from vlafit.types import Actor, Embodiment, require_same

UNADAPTED = AdaptRecipe()
FIX_RELATIVE = (
    "one of the two is wrong, or the card is for a fine-tune that changes them: correct `relative` in the "
    "card, or evaluate the actions as the policy makes them: {consent}"
)


@runtime_checkable
class OfRobot(Protocol):
    """An actor that knows its robot and what decides its actions."""

    embodiment: Embodiment

    def fingerprint(self) -> str:
        """Return all that decides its actions."""
        ...


@runtime_checkable
class OfData(Protocol):
    """An actor that says of which data it learned."""

    @property
    def learned(self) -> Learned:
        """What it says of the data that it learned from."""
        ...

    @property
    def relative(self) -> tuple[bool, ...] | None:
        """For each action dimension, whether it was learned relative to the state; None: not known."""
        ...


@dataclass(frozen=True)
class Confirmed:
    """Differences that are intended: options of `vlafit eval --data`."""

    cameras: tuple[str, ...] = ()
    """Cameras whose key has the name of another one."""
    frames: bool = False
    """Whether frames may be turned or flipped otherwise than those that the policy learned from."""
    conversion: bool = False
    """Whether values may be computed from the files otherwise than those that the policy learned from."""
    relative: bool = False
    """Whether the card may make other actions relative to the state than the policy learned so."""


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


def compare_readings(
    actor: Actor,
    store: EpisodeStore,
    title: str,
    adapt: AdaptRecipe = UNADAPTED,
    confirmed: Confirmed = Confirmed(),
) -> list[Item]:
    """Return how the card reads cameras, columns, frames and values, beside what the actor learned from.

    `title` names the policy and `adapt` is the `[adapt]` of its recipe. Raises EmbodimentError naming every
    difference that changes what the policy sees and is not `confirmed`, or a confirmed camera that is none.
    """
    learned = actor.learned if isinstance(actor, OfData) else UNSAID
    robot = actor.embodiment if isinstance(actor, OfRobot) else None
    slots = expected_of(actor, store.embodiment).seen
    sources = {name: name for name in slots}
    frames = Consent.of_option("--confirm-frames", confirmed.frames)
    values = Consent.of_option("--confirm-conversion", confirmed.conversion)
    mask = actor.relative if isinstance(actor, OfData) else None
    items = (
        *_cameras(store, learned, adapt, confirmed.cameras),
        _relative(store, mask, learned, Consent.of_option("--confirm-relative", confirmed.relative)),
        *column_order.items([store.card], learned, robot, fix=column_order.FIX_HERE),
        framing.item([store.card], learned, sources, slots, framing.frames(store.card), frames),
        *conversions.items([store.card], learned, values),
    )
    Agreement(items, (), ()).require(f"dataset {store.card.name!r} and {title}")
    return list(items)


def _cameras(
    store: EpisodeStore, learned: Learned, adapt: AdaptRecipe, confirmed: Sequence[str]
) -> Iterator[Item]:
    """Yield the keys of a dataset's cameras (see `camera_keys.items`).

    `confirmed` confirms them, and so does `adapt.cameras` where the policy does not say from which keys it
    learned. Raises EmbodimentError for a `confirmed` that is no camera.
    """
    reasons = dict.fromkeys(confirmed, "--confirm-cameras")
    for camera in confirmed:
        try:
            store.embodiment.camera(camera)
        except EmbodimentError as error:
            raise EmbodimentError(f"--confirm-cameras {quoted(camera)}: {error}") from None
    if not any(name.startswith(camera_keys.TITLE) for name in learned.said):  # of an older version
        reasons |= dict.fromkeys(adapt.cameras.values(), "adapt.cameras of the recipe")
    yield from camera_keys.items([store.card], learned, reasons, _confirm_cameras)


def _confirm_cameras(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    option = f"--confirm-cameras {' '.join(map(shlex.quote, names))}"
    return f"add {option}", (option,)


def _relative(store: EpisodeStore, mask: tuple[bool, ...] | None, learned: Learned, consent: Consent) -> Item:
    """Return which actions the card makes relative to the state, and which ones the policy learned so.

    What the policy answers is made absolute by its own mask, whatever the card says. A card as that of its
    run, whose recipe chose the other mask, is no conflict.
    """
    own = tuple(store.card.robot.relative)
    here, name = describe_mask(own), "relative actions"
    if mask is None:
        return Item(name, {"dataset": here}, "", "assumed", "the policy does not say")
    there = describe_mask(mask)
    item = Item(name, {"dataset": here, "checkpoint": there}, there, "same")
    if same_actions(own, mask):
        return item
    if learned.said.get(name) == here:
        return replace(item, status="chosen", reason="as in the policy's run")
    return consent.to(item, FIX_RELATIVE)


def adaptations(checkpoint: Path, embodiment: str = "") -> AdaptRecipe:
    """Return the `[adapt]` section of a run's checkpoint for an embodiment; an empty one without a recipe."""
    path = checkpoint / "recipe.toml"
    return config.read(Recipe, path, "recipe").adapt.of(embodiment) if path.is_file() else AdaptRecipe()
