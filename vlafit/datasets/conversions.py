"""Say how a card computes states and actions from the files, to compare it with what a checkpoint learned."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from vlafit.agreement import AS_STORED, Consent, Item, Learned
from vlafit.datasets.card import Card
from vlafit.datasets.card_texts import BETWEEN, of_cards, of_each

COLUMNS = ("state", "action")
FIX = (
    "files of the checkpoint's dataset need the checkpoint's `scale`, `offset` and `action_shift`: correct "
    "the card. If these files are written otherwise, so that the robot's values are the same: {consent}"
)
FIX_CARDS = (
    "are they the same values of the robot? If the files are written alike, give all cards the same `scale`, "
    "`offset` and `action_shift`; if they are written differently, so that the robot's values are the same: "
    "{consent}"
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
    cards: Sequence[Card], learned: Learned | None, consent: Consent, *, is_other_robot: bool = False
) -> Iterator[Item]:
    """Yield how states and actions are computed from the files, and how those were that a checkpoint learned.

    A card that computes them otherwise than the checkpoint's, or than another card, is a conflict, unless
    `consent` is given or, against the checkpoint's, the recipe teaches another robot. `learned` is None
    without a checkpoint.
    """
    for name in COLUMNS:
        title, here = f"{name} conversion", of_cards(cards, partial(conversion, name=name))
        there = learned.said.get(title, "") if learned is not None else ""
        sides = {"dataset": here, **({"checkpoint": there} if there else {})}
        made, accepted = Item(title, sides, here, "same"), consent.given or is_other_robot
        if there and all(conversion(card, name) in of_each(there) for card in cards):
            yield made
        elif BETWEEN in here and (accepted or not there):  # of several cards that differ
            yield consent.to(made, FIX_CARDS)
        elif not there:
            yield made if learned is None else replace(made, status="assumed", reason=learned.silence)
        elif is_other_robot and not consent.given:
            yield replace(made, status="chosen", reason="adapt.robot")
        else:
            yield consent.to(made, FIX)
