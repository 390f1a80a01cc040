"""Say how a card reads its cameras and actions, to compare it with another card, or with itself later."""

from collections.abc import Mapping, Sequence

from vlafit.agreement import Consent, Item, Learned
from vlafit.agreement.forms import describe_form
from vlafit.datasets.card import CameraCard, Card
from vlafit.datasets.card_texts import BETWEEN, of_each
from vlafit.datasets.conversions import COLUMNS, conversion

NOT_STATED = "not stated"
AS_STORED = "as stored"
FIX = (
    "does the policy see {cameras} as before? If the two datasets store it differently: {consent}; else "
    "correct `rotate`, `flip` and `channels` in the card"
)
FIX_CARDS = (
    "are all upright? If the datasets store their frames differently: {consent}; else correct `rotate`, "
    "`flip` and `channels` in the card"
)
"""How cards of one robot that turn frames differently are made to agree."""


def turned(camera: CameraCard) -> str:
    """Return what the card does to a camera's frames when they are read; "" for nothing."""
    words = [f"turned by {camera.rotate}"] if camera.rotate else []
    words += [f"flipped {camera.flip}"] if camera.flip else []
    words += ["bgr to rgb"] if camera.channels == "bgr" else []
    return " and ".join(words)


def frames(card: Card) -> str:
    """Return what the card does to the frames of its cameras: "front turned by 180", or "as stored"."""
    return ", ".join(f"{c.name} {text}" for c in card.robot.cameras if (text := turned(c))) or AS_STORED


def frames_of(cards: Sequence[Card]) -> str:
    """Return what cards do to their frames: once where they do the same, else for each card."""
    texts = [frames(card) for card in cards]
    if all(is_same(text, texts[0]) for text in texts):
        return texts[0]
    return "; ".join(f"{card.name}: {text}" for card, text in zip(cards, texts, strict=True))


def is_same(frames: str, other: str) -> bool:
    """Whether `frames` of a card are among those that `other`, of one card or several, describes."""
    return set(frames.split(", ")) in [set(text.split(", ")) for text in of_each(other)]


def item(
    cards: Sequence[Card],
    learned: Learned | None,
    sources: Mapping[str, str],
    slots: Sequence[str],
    value: str,
    consent: Consent,
) -> Item:
    """Return how cards read their frames, and how those were read that a checkpoint learned from.

    Frames that a camera of `sources`, a slot of the policy -> camera of the cards, turns or flips otherwise
    than the checkpoint's are a conflict, and so are cards that differ; `consent` accepts them. `learned` is
    None without a checkpoint, `slots` are those of its policy in order, `value` is what holds.
    """
    sides = {"dataset": frames_of(cards)}
    stated = learned.said.get("frames", "") if learned is not None else ""
    if not stated and BETWEEN in sides["dataset"]:  # of several cards that differ
        return consent.to(Item("frames", sides, value, "same"), FIX_CARDS)
    if learned is None:
        return Item("frames", sides, value, "same")
    if not stated:
        return Item("frames", sides, value, "assumed", learned.silence)
    other = differing(cards, stated, learned.by_camera(sources, slots))
    made = Item("frames", {**sides, "checkpoint": stated}, value, "same")
    fix = FIX.replace("{cameras}", " and ".join(dict.fromkeys(other)))
    return consent.to(made, fix) if other else made


def differing(cards: Sequence[Card], learned: str, sources: Mapping[str, str]) -> list[str]:
    """Return the cameras that the `cards` turn or flip otherwise than the frames of a checkpoint were.

    `learned` is that of the checkpoint, `sources` its cameras and those of the cards that take their place.
    """
    changes = [
        {}
        if text == AS_STORED
        else {name: how for name, _, how in (p.partition(" ") for p in text.split(", "))}
        for text in of_each(learned)
    ]
    return [
        source
        for slot, source in sources.items()
        for card in cards
        for camera in card.robot.cameras
        if camera.name == source and turned(camera) not in [one.get(slot, "") for one in changes]
    ]


def reading(card: Card) -> dict[str, str]:
    """Return what a card says of cameras, relative actions, units, names and conversions.

    No hash covers them but the last: values that are computed otherwise are other data, and this says why.
    """
    stated = {
        f"camera {c.name}": f"key {c.key}, {c.height}x{c.width}, {turned(c) or AS_STORED}"
        for c in card.robot.cameras
    }
    stated |= {
        f"{column.name} unit": column.unit or NOT_STATED
        for column in (card.embodiment.state, card.embodiment.action)
    }
    stated |= {
        f"{column.name} names": ", ".join(column.labels) or NOT_STATED
        for column in (card.embodiment.state, card.embodiment.action)
    }
    stated |= {f"{name} conversion": conversion(card, name) for name in COLUMNS}
    dimensions = [str(number) for number, on in enumerate(card.robot.relative) if on]
    stated |= {
        f"robot.{name} is learned": describe_form(column.form)
        for name, column in (("state", card.robot.state), ("action", card.robot.action))
        if not column.form.is_plain
    }
    return stated | {"robot.relative": f"dimensions {', '.join(dimensions)}" if dimensions else "none"}
