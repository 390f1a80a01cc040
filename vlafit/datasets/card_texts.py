"""One text for several cards: once where they say the same, else for each of them by its name."""

from collections.abc import Callable, Sequence

from vlafit.datasets.card import Card

BETWEEN = "; "


def of_cards(cards: Sequence[Card], text_of: Callable[[Card], str]) -> str:
    """Return what cards say: "left", or "first: left; second: right" where they differ."""
    texts = {card.name: text_of(card) for card in cards}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return BETWEEN.join(f"{card}: {text}" for card, text in texts.items())


def of_each(text: str) -> list[str]:
    """Return what each of the cards says whose text this is."""
    return [one.partition(": ")[2] or one for one in text.split(BETWEEN)]
