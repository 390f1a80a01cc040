"""Say how a card computes states and actions from the files, to compare it with what a checkpoint learned."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from vlafit.agreement import AS_STORED, Item
from vlafit.agreement.values import said_of_data
from vlafit.datasets.card import Card
from vlafit.datasets.card_texts import BETWEEN, of_cards, of_each

COLUMNS = ("state", "action")
CHOSEN_BY = "adapt.conversion"
"""What in a recipe accepts other conversions."""
FIX = (
    "files of the checkpoint's dataset need the checkpoint's `scale`, `offset` and `action_shift`: correct "
    "the card. If these files are written otherwise, so that the robot's values are the same: [adapt] "
    "conversion = true"
)
FIX_CARDS = (
    "are they the same values of the robot? If the files are written alike, give all cards the same `scale`, "
    "`offset` and `action_shift`; if they are written differently, so that the robot's values are the same: "
    "[adapt] conversion = true"
)
"""How cards of one robot that compute values differently are made to agree."""


def conversion(card: Card, name: str) -> str:
    """Return what the card does to a column when it is read: "times -1 in dimension 2", or "as in the files".

    Dimensions are those of the column, from 0 on.
    """
    column = card.robot.state if name == "state" else card.robot.action
    words = [*_by_value("times", column.scale, 1.0), *_by_value("plus", column.offset, 0.0)]
    if name == "action" and card.rows.action_shift:
        words.append(f"that of row t{card.rows.action_shift:+d}")
    return ", ".join(words) or AS_STORED


def _by_value(word: str, values: Sequence[float], nothing: float) -> Iterator[str]:
    pairs = sorted((value, number) for number, value in enumerate(values) if value != nothing)
    for value, group in groupby(pairs, key=lambda pair: pair[0]):
        numbers = [number for _, number in group]
        if len(numbers) == len(values):
            yield f"{word} {value:.9g}"
        else:
            plural = "s" if len(numbers) > 1 else ""
            yield f"{word} {value:.9g} in dimension{plural} {' and '.join(map(str, numbers))}"


def items(
    cards: Sequence[Card],
    checkpoint: Path | None,
    embodiment: str = "",
    *,
    chosen_by: str = "",
    is_refused: bool = True,
) -> Iterator[Item]:
    """Yield how states and actions are computed from the files, and how those were that a checkpoint learned.

    A card that computes them otherwise than the checkpoint's, or than another card, is a conflict, unless
    the recipe says that it may: `chosen_by` is the option that does. `embodiment` is the checkpoint's, of
    several. Without `is_refused` it only differs.
    """
    stated = said_of_data(checkpoint, embodiment) if checkpoint is not None else {}
    for name in COLUMNS:
        title, here = f"{name} conversion", of_cards(cards, partial(conversion, name=name))
        there = stated.get(title, "")
        sides = {"dataset": here, **({"checkpoint": there} if there else {})}
        if there and all(conversion(card, name) in of_each(there) for card in cards):
            yield Item(title, sides, here, "same")
        elif BETWEEN in here and (chosen_by or not there):  # of several cards that differ
            own = chosen_by if chosen_by == CHOSEN_BY else ""
            yield Item(title, sides, here, "same").differing(FIX_CARDS, CHOSEN_BY, own)
        elif not there:
            reason = "" if checkpoint is None else "the checkpoint does not say"
            yield Item(title, sides, here, "assumed" if reason else "same", reason)
        elif chosen_by:
            yield Item(title, sides, here, "chosen", chosen_by)
        elif is_refused:
            yield Item(title, sides, "", "conflict", fix=FIX, accept=(f"--{CHOSEN_BY} true",))
        else:
            yield Item(title, sides, here, "differs", "are these the values that it learned?")
