"""Compare how cards read files, frame by frame and value by value, with what a checkpoint learned from."""

from collections.abc import Iterator, Mapping, Sequence

from vlafit import checkpoints
from vlafit.agreement import Agreement, Consent, Item, Learned
from vlafit.agreement.camera_map import to_themselves
from vlafit.codec import Codec
from vlafit.datasets import Card, camera_keys, column_order, conversions, framing
from vlafit.recipe import AdaptRecipe, Recipe


def learned_by(declared: checkpoints.Declaration | None, before: Codec | None) -> Learned | None:
    """Return what a checkpoint says of the data of one embodiment; None without a checkpoint.

    `declared` is what its files say, `before` its codec of that embodiment.
    """
    if declared is None:
        return None
    return Learned.of(declared.agreement, before.embodiment.name if before is not None else "")


def frames(
    recipe: Recipe,
    cards: Sequence[Card],
    learned: Learned | None,
    slots: Sequence[str],
    sources: Mapping[str, str],
    value: str,
) -> Item:
    """Return the item of the frames: a conflict where the checkpoint's were turned or flipped otherwise.

    `slots` are the policy's in order, `sources` maps them to the cards' cameras that fill them.
    """
    return framing.item(cards, learned, sources, slots, value, of_frames(recipe.adapt))


def items(
    recipe: Recipe, cards: Sequence[Card], learned: Learned | None, before: Codec | None
) -> Iterator[Item]:
    """Yield from where cameras, states and actions are read, and how values are computed from the files.

    Beside them stand those that the checkpoint learned from, whose codec is `before`.
    """
    is_other_robot = recipe.adapt.robot and recipe.fits_statistics
    robot = before.embodiment if before is not None else None
    slots = before.config.cameras if before is not None else ()
    yield from keys(recipe.adapt, cards, learned, by_name=False, slots=slots)
    yield from column_order.items(cards, learned, robot, may_differ=is_other_robot)
    consent = of_conversions(recipe.adapt)
    yield from conversions.items(cards, learned, consent, is_other_robot=is_other_robot)


def of_card(
    recipe: Recipe,
    card: Card,
    codec: Codec | None,
    declared: checkpoints.Declaration,
    agreement: Agreement,
) -> Agreement:
    """Return the agreement with what the card alone tells, where its files or a codec are not there."""
    learned = learned_by(declared, codec)
    slots = codec.config.cameras if codec is not None else declared.slots or agreement.cameras
    sources = dict(zip(slots, agreement.cameras, strict=False))
    made = [frames(recipe, (card,), learned, slots, sources, framing.frames(card))]
    made += items(recipe, (card,), learned, codec)
    known = {item.name for item in agreement.items}
    return agreement.with_items([item for item in made if item.name not in known])


def keys(
    adapt: AdaptRecipe,
    cards: Sequence[Card],
    learned: Learned | None,
    others: Sequence[Card] = (),
    *,
    by_name: bool = True,
    slots: Sequence[str] = (),
) -> Iterator[Item]:
    """Yield the keys of the cameras (see `camera_keys.items`); a recipe's `adapt.cameras` confirms them.

    `slots` are the checkpoint's, in order.
    """
    mapped = {slot: camera for slot, camera in adapt.cameras.items() if camera}
    confirmed = dict.fromkeys(mapped.values(), "adapt.cameras")
    renamed = learned.by_camera(mapped, slots) if learned is not None else None
    yield from camera_keys.items(
        cards, learned, confirmed, to_themselves, others, by_name=by_name, renamed=renamed
    )


def of_frames(adapt: AdaptRecipe) -> Consent:
    """Return the recipe's consent to frames that are read otherwise."""
    return Consent.of_recipe("adapt.frames", adapt.frames)


def of_conversions(adapt: AdaptRecipe) -> Consent:
    """Return the recipe's consent to values that are computed from the files otherwise."""
    return Consent.of_recipe("adapt.conversion", adapt.conversion)
