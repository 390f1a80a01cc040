"""Another dataset of the same robot whose statistics a run takes (`data.statistics_from`)."""

from collections.abc import Callable

from vlafit.agreement import describe_form, describe_mask, describe_recorded, same_actions
from vlafit.datasets import Card, EpisodeStore, open_dataset
from vlafit.datasets.recorded_forms import require_forms
from vlafit.errors import ConfigError, DataError
from vlafit.recipe import DataRecipe

REMEDY = "name a dataset of the same robot, or leave data.statistics_from out"


def different(card: Card, other: Card, other_is: str) -> str:
    """Return what two cards of a robot let a policy learn differently of states or actions; "": nothing.

    `other_is` names the other one: "robot.relative differs from card 'a': absolute, there all relative".
    """
    here, there = card.robot, other.robot
    if not same_actions(tuple(here.relative), tuple(there.relative)):
        mine, its = (describe_mask(tuple(robot.relative)) for robot in (here, there))
        return f"robot.relative differs from {other_is}: {mine}, there {its}"
    for name, one, two in (
        ("state", here.state.form, there.state.form),
        ("action", here.action.form, there.action.form),
    ):
        if one != two:
            said = [(text_of(one), text_of(two)) for text_of in (describe_form, describe_recorded)]
            values = next((f": {a or 'none'}, there {b or 'none'}" for a, b in said if a != b), "")
            return f"what is learned of robot.{name} differs from {other_is}{values}"
    return ""


def describing(
    recipe: DataRecipe, load: Callable[[str, DataRecipe], Card], card: Card
) -> EpisodeStore | None:
    """Open the dataset of `data.statistics_from` for the robot of `card`; None where the recipe names none.

    Raises ConfigError where the option has no effect or the dataset is of another robot, DataError where it
    has no episodes.
    """
    name = recipe.statistics_from
    if not name:
        return None
    where = f"data.statistics_from = {name!r}"
    if recipe.statistics != "data":
        raise ConfigError(
            f'{where} has no effect with data.statistics = "{recipe.statistics}": set that to "data", or '
            "leave data.statistics_from out"
        )
    if recipe.embodiments:
        raise ConfigError(f"{where} is of one robot, and data.embodiments has several: leave one of both out")
    store = open_dataset(load(name, recipe))
    if not store.episodes:
        raise DataError(f"{where}: the dataset has no episodes to take statistics of")
    for (what, its), (_, own) in zip(_facts(store.card), _facts(card), strict=True):
        if its != own:
            raise ConfigError(
                f"{where}: its {what} is {its!r}, and that of {card.name!r} is {own!r}, so its statistics "
                f"are of other numbers; {REMEDY}"
            )
    if fault := different(store.card, card, f"card {card.name!r}"):
        raise ConfigError(f"{where}: {fault}; {REMEDY}")
    require_forms(store, [episode.id for episode in store.episodes])
    return store


def _facts(card: Card) -> list[tuple[str, object]]:
    """Return what must be the same for statistics to be of the same numbers. Cameras may differ."""
    facts: list[tuple[str, object]] = [("robot.control", card.robot.control), ("robot.hz", card.robot.hz)]
    for name, column in (("state", card.robot.state), ("action", card.robot.action)):
        facts += [(f"robot.{name}.{key}", getattr(column, key)) for key in ("dimensions", "labels", "unit")]
    return facts
