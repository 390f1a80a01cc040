"""Compare the keys from which cards read their cameras: under another camera's key are other pictures."""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Protocol

from vlafit.agreement import UNSAID, Item, Learned
from vlafit.agreement.cameras import misnamed
from vlafit.datasets.card import Card
from vlafit.datasets.card_texts import of_cards, of_each

TITLE = "key of camera "
"""An item is named this and the camera."""
FIX = "correct the card; if it is right: {remedy}"
LEARNED = "the checkpoint learned from the same key"
OLDER = re.compile(r"camera (.+) reads (.+), which (?:has the name of camera .+|is of the other hand)")
"""Item of an agreement without the items above: a camera whose key has the name of another one."""


class Remedy(Protocol):
    """How a user says that cameras read the right keys."""

    def __call__(self, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """Return what to write for the cameras `names`, and the same as options of the command."""
        ...


def keys_of(card: Card) -> dict[str, str]:
    """Return where the files of a card have the frames of each camera."""
    return {camera.name: camera.key for camera in card.robot.cameras}


def learned_keys(learned: Learned) -> set[tuple[str, str]]:
    """Return the cameras that a checkpoint learned from, each with its key: one for each card."""
    named = {
        (name.removeprefix(TITLE), key)
        for name, text in learned.said.items()
        if name.startswith(TITLE)
        for key in of_each(text)
    }
    older = filter(None, map(OLDER.fullmatch, learned.said.values()))
    return named | {(match[1], match[2]) for match in older}


def items(
    cards: Sequence[Card],
    learned: Learned | None,
    confirmed: Mapping[str, str],
    remedy: Remedy,
    others: Sequence[Card] = (),
    *,
    by_name: bool = True,
) -> Iterator[Item]:
    """Yield the keys of the cards' cameras, and those that a checkpoint learned from, where it says.

    A key that has the name of another camera, or from which the checkpoint, one of the `others` (training
    data) or an earlier card reads another camera, is a conflict unless `confirmed`, camera -> why, has it.
    Without `by_name`, such names in the first card are left to who fills the slots, until they are confirmed.
    """
    pairs = learned_keys(learned or UNSAID)
    asked: dict[str, list[str]] = {}
    for number, card in enumerate(cards):
        before = [*others, *cards[:number]]
        left = set() if by_name or before else keys_of(card).keys() - confirmed.keys()
        for name, text in _questions(card, before, pairs, left).items():
            asked.setdefault(name, []).append(f"card {card.name!r}: {text}" if len(cards) > 1 else text)
    reasons = {name: LEARNED for name in asked if {(name, keys_of(c)[name]) for c in cards} <= pairs}
    reasons |= confirmed
    text, accept = remedy([name for name in asked if name not in reasons])
    for name in dict.fromkeys(name for card in cards for name in keys_of(card)):
        some = [card for card in cards if name in keys_of(card)]
        here = of_cards(some, partial(_key, name))
        there = " and ".join(sorted(key for camera, key in pairs if camera == name))
        sides = {"dataset": here, **({"checkpoint": there} if there else {})}
        if name not in asked:
            yield Item(f"{TITLE}{name}", sides, here, "same")
        elif name in reasons:
            yield Item(f"{TITLE}{name}", sides, here, "chosen", reasons[name])
        else:
            sentences = {"dataset": "; ".join(asked[name])}
            yield Item(
                f"{TITLE}{name}", sentences, "", "conflict", fix=FIX.format(remedy=text), accept=accept
            )


def _key(name: str, card: Card) -> str:
    return keys_of(card)[name]


def _questions(
    card: Card, others: Sequence[Card], learned: AbstractSet[tuple[str, str]], left: AbstractSet[str]
) -> dict[str, str]:
    """Return a sentence for each camera, by name, whose key is another camera's.

    A camera that one of the `others` reads from the same key has none, and so has one that is `left` whose
    key has the name of another one.
    """
    keys, found = keys_of(card), {}
    known = {pair for other in others for pair in keys_of(other).items()}
    for name, key in keys.items():
        if (name, key) in known:
            continue
        text = misnamed(name, keys)
        if text and name in left:
            continue
        if text := _beside(text, name, others, learned) if text else _elsewhere(name, key, others, learned):
            found[name] = text
    return found


def _beside(text: str, name: str, others: Sequence[Card], learned: AbstractSet[tuple[str, str]]) -> str:
    """Return a sentence with the key from which another card, or the checkpoint, reads the camera `name`."""
    said = [f"card {other.name!r} reads {keys_of(other)[name]}" for other in others if name in keys_of(other)]
    said += [f"the checkpoint learned it from {key}" for camera, key in sorted(learned) if camera == name]
    return f"{text} ({said[0]})" if said else text


def _elsewhere(name: str, key: str, others: Sequence[Card], learned: AbstractSet[tuple[str, str]]) -> str:
    """Return which card, or checkpoint, reads another camera from the key of the camera `name`."""
    for other in others:
        keys = keys_of(other)
        for camera in keys:
            if name in keys and keys[camera] == key:
                return f"camera {name} reads {key}, from which card {other.name!r} reads camera {camera}"
    if (name, key) in learned or name not in {camera for camera, _ in learned}:
        return ""
    for camera, there in sorted(learned):
        if there == key:
            return f"camera {name} reads {key}, from which the checkpoint learned camera {camera}"
    return ""
