"""Say from which columns a card reads states and actions, to compare them with those that were learned."""

from collections.abc import Iterator, Sequence

from vlafit.agreement import UNSAID, Item, Learned
from vlafit.datasets.card import Card
from vlafit.datasets.card_texts import of_cards, of_each
from vlafit.datasets.columns import parse_key
from vlafit.errors import ConfigError
from vlafit.types import Embodiment, Feature

BETWEEN = " + "
FIX = (
    "without names of the dimensions on both sides, only their order tells them apart: list the columns in "
    "the checkpoint's order, or, if this is another robot, [adapt] robot = true and data.statistics = "
    '"data"'
)
FIX_HERE = (
    "without names of the dimensions on both sides, only their order tells them apart: list the columns in "
    "robot.{name}.keys of the card in the checkpoint's order"
)
FIX_CARDS = (
    "without names of the dimensions on all cards, only their order tells them apart: list the columns in "
    "robot.{name}.keys of each card in one order, or give all cards `labels`"
)


def read_from(cards: Sequence[Card], name: str) -> str:
    """Return the columns from which cards read the state or action (`name`)."""
    return of_cards(cards, lambda card: of_card(card, name))


def of_card(card: Card, name: str) -> str:
    """Return the columns from which a card reads the state or action (`name`)."""
    return BETWEEN.join(_keys(card, name))


def is_reordered(card: Card, others: Sequence[Card], name: str) -> bool:
    """Whether a card reads the columns of others in another order, and no names tell which is which."""
    if all(_column(one.embodiment, name).labels for one in (card, *others)):
        return False
    return _reordered(card, name, read_from(others, name))


def items(
    cards: Sequence[Card],
    learned: Learned | None,
    robot: Embodiment | None,
    *,
    may_differ: bool = False,
    fix: str = FIX,
) -> Iterator[Item]:
    """Yield the columns of states and actions, and those that a checkpoint learned from, where it says.

    `robot` is the checkpoint's. The same columns in another order are a conflict, unless the dimensions have
    names on both sides or `may_differ` (another robot).
    """
    for name in ("state", "action"):
        title, here = f"{name} columns", read_from(cards, name)
        stated = (learned or UNSAID).said.get(title, "")
        named = robot is not None and bool(_column(robot, name).labels)
        named = named and all(_column(card.embodiment, name).labels for card in cards)
        if not stated:
            reordered = any(is_reordered(card, cards[:1], name) for card in cards[1:])
            if reordered:
                yield Item(title, {"dataset": here}, "", "conflict", fix=FIX_CARDS.format(name=name))
            elif learned is None or named:
                yield Item(title, {"dataset": here}, here, "same")
            else:
                yield Item(title, {"dataset": here}, here, "assumed", learned.silence)
            continue
        sides = {"dataset": here, "checkpoint": stated}
        if here == stated:
            yield Item(title, sides, here, "same")
        elif named or not any(_reordered(card, name, stated) for card in cards):
            yield Item(title, sides, here, "same" if named else "assumed", "" if named else "same order")
        elif may_differ:
            yield Item(title, sides, here, "chosen", "adapt.robot")
        else:
            accept = ("--adapt.robot true", "--data.statistics data") if fix is FIX else ()
            yield Item(title, sides, "", "conflict", fix=fix.format(name=name), accept=accept)


def _keys(card: Card, name: str) -> tuple[str, ...]:
    return card.robot.state.keys if name == "state" else card.robot.action.keys


def _column(robot: Embodiment, name: str) -> Feature:
    return robot.state if name == "state" else robot.action


def _reordered(card: Card, name: str, stated: str) -> bool:
    """Whether a card reads the same dimensions as one of the stated texts, but in another order."""
    width = _column(card.embodiment, name).shape[0]
    here = _dimensions(_keys(card, name), width)
    every = [_dimensions(text.split(BETWEEN), width) for text in of_each(stated)]
    return here not in every and any(sorted(here) == sorted(one) for one in every)


def _dimensions(texts: Sequence[str], width: int) -> list[tuple[str, int]]:
    """Return (path, dimension) pairs in order, `width` in all; a part of unknown width is one pair."""
    try:
        keys = [parse_key(text, "column") for text in texts]
    except ConfigError:  # of another version
        return [(text, -1) for text in texts]
    known = [_bounded(key.some) for key in keys]
    open_ends = [number for number, one in enumerate(known) if one is None]
    if len(open_ends) == 1:
        some = keys[open_ends[0]].some
        room, start = width - sum(len(one) for one in known if one is not None), some.start or 0
        if some.step in (None, 1) and start >= 0:
            known[open_ends[0]] = range(start, start + room)
        elif some == slice(None, None, -1):
            known[open_ends[0]] = range(room - 1, -1, -1)
    return [
        pair
        for text, key, one in zip(texts, keys, known, strict=True)
        for pair in ([(text, -1)] if one is None else [(key.path, number) for number in one])
    ]


def _bounded(some: slice) -> range | None:
    """Return the dimensions of a slice; None where they depend on how many there are."""
    start, step = some.start or 0, some.step or 1
    if some.stop is None or some.stop < 0 or start < 0 or step < 0:
        return None
    return range(start, some.stop, step)
