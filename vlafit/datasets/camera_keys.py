"""Compare the keys from which cards read their cameras: under another camera's key are other pictures."""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Protocol

from vlafit.agreement import UNSAID, Item, Learned
from vlafit.agreement.cameras import misnamed
from vlafit.datasets.card import Card
from vlafit.datasets.card_texts import of_cards, of_each

GENERAL = {"rgb", "rgba", "image", "images", "img", "color", "frames", "video", "data"}
"""Words in the end of a key that tell no camera."""
TITLE = "key of camera "
"""An item is named this and the camera."""
FIX = "correct the card; if it is right: {remedy}"
LEARNED = "the checkpoint learned from the same key"
OTHER_KEY = "another key, of no other camera"
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


@dataclass(frozen=True)
class Other:
    """What else says from which keys cameras are read: another card, or what a checkpoint learned from."""

    reads: str
    """The words before a camera's name: "card 'a' reads camera"."""
    keys: Mapping[str, str]

    @classmethod
    def of_card(cls, card: Card) -> "Other":
        """Return the keys of another card."""
        return cls(f"card {card.name!r} reads camera", keys_of(card))


def learned_by(learned: Learned, renamed: Mapping[str, str] | None = None) -> list[Other]:
    """Return the keys of the cards that a checkpoint learned from, as far as it says.

    A camera that the cards at hand call otherwise has that name: `renamed` is the checkpoint's -> theirs.
    """
    cards: dict[int, dict[str, str]] = {}
    renamed = renamed or {}
    for name, text in learned.said.items():
        if name.startswith(TITLE):
            for number, key in enumerate(of_each(text)):
                camera = name.removeprefix(TITLE)
                cards.setdefault(number, {})[renamed.get(camera, camera)] = key
        elif match := OLDER.fullmatch(text):
            cards.setdefault(0, {})[renamed.get(match[1], match[1])] = match[2]
    for keys in cards.values():  # a key that all cards have is said once
        cards[0] = {**keys, **cards[0]}
    return [Other("the checkpoint learned camera", {**cards[0], **keys}) for keys in cards.values()]


def items(
    cards: Sequence[Card],
    learned: Learned | None,
    confirmed: Mapping[str, str],
    remedy: Remedy,
    others: Sequence[Card] = (),
    *,
    by_name: bool = True,
    renamed: Mapping[str, str] | None = None,
) -> Iterator[Item]:
    """Yield the keys of the cards' cameras, and those that a checkpoint learned from, where it says.

    A key that has the name of another camera, or from which the checkpoint, one of the `others` (training
    data) or an earlier card reads another camera, is a conflict unless `confirmed`, camera -> why, has it.
    Without `by_name`, such names in the first card are left to who fills the slots, until they are confirmed.
    `renamed` is a camera of the checkpoint -> the cards' that takes its place, where they differ.
    """
    said = learned_by(learned or UNSAID, renamed)
    pairs = {pair for one in said for pair in one.keys.items()}
    beside = {"checkpoint": pairs, "training data": {pair for one in others for pair in keys_of(one).items()}}
    asked: dict[str, list[str]] = {}
    for number, card in enumerate(cards):
        before = [*others, *cards[:number]]
        left = set() if by_name or before else keys_of(card).keys() - confirmed.keys()
        for name, text in _questions(card, list(map(Other.of_card, before)), said, left).items():
            asked.setdefault(name, []).append(f"card {card.name!r}: {text}" if len(cards) > 1 else text)
    reasons = {name: LEARNED for name in asked if {(name, keys_of(c)[name]) for c in cards} <= pairs}
    reasons |= confirmed
    text, accept = remedy([name for name in asked if name not in reasons])
    for name in dict.fromkeys(name for card in cards for name in keys_of(card)):
        some = [card for card in cards if name in keys_of(card)]
        here = of_cards(some, partial(_key, name))
        there = {role: {key for camera, key in of if camera == name} for role, of in beside.items()}
        sides = {"dataset": here, **{role: " and ".join(sorted(keys)) for role, keys in there.items()}}
        sides = {role: text for role, text in sides.items() if text}
        if name not in asked:
            own = {_key(name, card) for card in some}
            differ = len(own) > 1 or any(keys and not own <= keys for keys in there.values())
            yield Item(
                f"{TITLE}{name}", sides, here, "differs" if differ else "same", OTHER_KEY if differ else ""
            )
        elif name in reasons:
            yield Item(f"{TITLE}{name}", sides, here, "chosen", reasons[name])
        else:
            sentences = {"dataset": "; ".join(asked[name])}
            yield Item(
                f"{TITLE}{name}", sentences, "", "conflict", fix=FIX.format(remedy=text), accept=accept
            )


def across(cards: Sequence[Card], others: Sequence[Card]) -> dict[str, str]:
    """Return a sentence for each camera, by name, that one of the `others`, of another robot, reads from the
    key of another camera.
    """
    found = {}
    for card, other in product(cards, map(Other.of_card, others)):
        keys = keys_of(card)
        found |= {name: text for name in keys if (text := _elsewhere(name, keys, other))}
    return found


def _key(name: str, card: Card) -> str:
    return keys_of(card)[name]


def _questions(
    card: Card, others: Sequence[Other], learned: Sequence[Other], left: AbstractSet[str]
) -> dict[str, str]:
    """Return a sentence for each camera, by name, whose key is another camera's.

    A camera that one of the `others` reads from the same key has none, and so has one that is `left` whose
    key has the name of another one.
    """
    keys, found, every = keys_of(card), {}, [*others, *learned]
    for name, key in keys.items():
        if any(other.keys.get(name) == key for other in others):
            continue
        text = misnamed(name, keys)
        if text and name in left:
            continue
        if text and (one := next((one for one in every if name in one.keys), None)):
            text = f"{text} ({one.reads} {name} from {one.keys[name]})"
        elif not text and not any(one.keys.get(name) == key for one in learned):
            text = next(filter(None, (_elsewhere(name, keys, one) for one in every)), "")
        if text:
            found[name] = text
    return found


def _elsewhere(name: str, keys: Mapping[str, str], other: Other) -> str:
    """Return how the key of the camera `name` is another camera's elsewhere; "" where it is not.

    Of keys that are written in other words only an exchange tells: top from obs/cam_1 and wrist from
    obs/cam_2, and elsewhere top from images/cam2 and wrist from images/cam1.
    """
    if name not in other.keys:
        return ""
    for camera, key in other.keys.items():
        if camera != name and key == keys[name]:
            return f"camera {name} reads {key}, from which {other.reads} {camera}"
    ends, there = ({camera: _end(key) for camera, key in of.items()} for of in (keys, other.keys))
    camera = name
    for _ in there:
        camera = next((one for one in there if there[one] == ends.get(camera)), "")
        if camera in ("", name):
            break
    first = next((one for one in there if there[one] == ends[name]), "")
    if camera != name or first == name:
        return ""
    return f"camera {name} reads {keys[name]}, and {other.reads} {first} from {other.keys[first]}"


def _end(key: str) -> tuple[str, ...]:
    """Return the words of a key that tell a camera: obs/cam_1, images.cam1_rgb and camera_1/rgb are alike."""
    for part in reversed(re.split(r"[/.]", key)):
        words = [word.lower() for word in re.findall(r"[A-Za-z]+|\d+", part)]
        words = ["cam" if word == "camera" else word for word in words if word not in GENERAL]
        if words:
            return tuple(words)
    return (key,)
