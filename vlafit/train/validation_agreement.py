"""Compare validation sets with the training data: how cards read them, and the values under the statistics.

A set whose card turns frames or signs otherwise has the loss of other pictures or values, which looks like
any other loss. So a difference is a conflict, as it is between the cards of a mixture; the same keys of
`[adapt]` accept it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from vlafit.agreement import Agreement, Item
from vlafit.codec import CodecSet
from vlafit.datasets import Card, column_order, conversions, framing, value_faults
from vlafit.datasets.card_texts import of_cards
from vlafit.recipe import AdaptRecipe, Recipe
from vlafit.train import readings
from vlafit.train.data import Data, ValidationSets

PART = "validation/"
"""How the part of a run is named that items of a set are of, as its metrics are."""
VALUES = replace(
    value_faults.TRAINING,
    refit="Else leave the set out: its loss would say little",
    question="is the set in other units than the training data, or of another robot?",
    side="statistics",
)
COLUMNS = (
    "without names of the dimensions on both sides, only their order tells them apart: list the columns in "
    "robot.{name}.keys of the card in the training data's order, or give both cards `labels`"
)


def of_readings(sets: ValidationSets, recipe: Recipe, data: Data) -> dict[str, Agreement]:
    """Return, for each place in the recipe, how its cards and those of the training data read the files."""
    agreements = {}
    for name, stores in sets.items():
        items: list[Item] = []
        for embodiment in dict.fromkeys(map(data.name_of, stores)):
            cards = [store.card for store in stores if data.name_of(store) == embodiment]
            trained, adapt = data.of(embodiment).cards, recipe.adapt.of(embodiment)
            made = [_frames(cards, trained, adapt), *_columns(cards, trained)]
            made += _conversions(cards, trained, adapt)
            made += readings.keys(adapt, cards, None, trained)
            items += _named(made, f", {PART}{name}", embodiment, data)
        agreements[f"data.validation_sets.{name}"] = Agreement(tuple(items), (), ())
    if (other := data.described_by) is not None:
        made = [*_columns([other.card], data.cards), *_conversions([other.card], data.cards, recipe.adapt)]
        items = _named(made, ", data.statistics_from", data.names[0], data)
        agreements["data.statistics_from"] = Agreement(tuple(items), (), ())
    return agreements


def of_values(sets: ValidationSets, recipe: Recipe, data: Data, codecs: CodecSet) -> dict[str, Agreement]:
    """Return, for each place in the recipe, how far values of its sets go under the statistics in use."""
    agreements = {}
    for name, stores in sets.items():
        items: list[Item] = []
        for embodiment in dict.fromkeys(map(data.name_of, stores)):
            some = [store for store in stores if data.name_of(store) == embodiment]
            every = [[info.id for info in store.episodes] for store in some]
            codec = codecs.of_data(embodiment, where="the run")
            outside, part = recipe.adapt.of(embodiment).outside, f"{PART}{name}"
            made = value_faults.items(some, every, codec, outside, False, VALUES, part)
            items += _named([*made], "", embodiment, data)
        agreements[f"data.validation_sets.{name}"] = Agreement(tuple(items), (), ())
    return agreements


def require(agreements: Mapping[str, Agreement], other: str) -> None:
    """Raise EmbodimentError naming the place in the recipe and each conflict; `other` is the other side."""
    for where, agreement in agreements.items():
        agreement.require(f"{where} and {other}")


def warnings(agreements: Mapping[str, Agreement]) -> Iterator[str]:
    """Yield a sentence for each conflict of a run that began with it, and is resumed."""
    for where, agreement in agreements.items():
        for item in agreement.conflicts:
            sides = "; ".join(f"{side}: {text}" for side, text in item.sides.items())
            yield f"{where}: {item.name}: {sides}: what is computed from it says little"


def joined(agreement: Agreement, parts: Sequence[Mapping[str, Agreement]]) -> Agreement:
    """Return the run's agreement with these items, in place of those that it has of validation sets.

    What a resumed run does not refuse is there as a difference.
    """
    made = [
        replace(item, status="differs", reason="the run began with it") if item.status == "conflict" else item
        for part in parts
        for one in part.values()
        for item in one.items
    ]
    names = {item.name for item in made}
    kept = [item for item in agreement.items if f", {PART}" not in item.name and item.name not in names]
    return replace(agreement, items=(*kept, *made))


def _named(items: Sequence[Item], ending: str, embodiment: str, data: Data) -> list[Item]:
    """Return the items under the names that a run's agreement has for them."""
    named = tuple(replace(item, name=f"{item.name}{ending}") for item in items)
    if len(data.names) == 1:
        return [*named]
    own = Agreement(named, (), ()).for_embodiment(embodiment)
    return [replace(item, name=f"{embodiment}: {item.name}") for item in own.items]


def _frames(cards: Sequence[Card], trained: Sequence[Card], adapt: AdaptRecipe) -> Item:
    stated = framing.frames_of(trained)
    is_same = all(framing.is_same(framing.frames(card), stated) for card in cards)
    made = Item("frames", _sides(cards, trained, framing.frames), framing.frames_of(cards), "same")
    return made if is_same else readings.of_frames(adapt).to(made, framing.FIX_CARDS)


def _columns(cards: Sequence[Card], trained: Sequence[Card]) -> Iterator[Item]:
    for name in conversions.COLUMNS:
        made = Item(
            f"{name} columns",
            _sides(cards, trained, partial(column_order.of_card, name=name)),
            column_order.read_from(cards, name),
            "same",
        )
        if any(column_order.is_reordered(card, trained, name) for card in cards):
            made = replace(made, value="", status="conflict", fix=COLUMNS.format(name=name))
        yield made


def _conversions(cards: Sequence[Card], trained: Sequence[Card], adapt: AdaptRecipe) -> Iterator[Item]:
    for name in conversions.COLUMNS:
        text_of = partial(conversions.conversion, name=name)
        made = Item(f"{name} conversion", _sides(cards, trained, text_of), of_cards(cards, text_of), "same")
        is_same = {*map(text_of, cards)} <= {*map(text_of, trained)}
        yield made if is_same else readings.of_conversions(adapt).to(made, conversions.FIX_CARDS)


def _sides(cards: Sequence[Card], trained: Sequence[Card], text_of: Callable[[Card], str]) -> dict[str, str]:
    return {
        role: "; ".join(f"{card.name}: {text_of(card)}" for card in some)
        for role, some in (("dataset", cards), ("training data", trained))
    }
