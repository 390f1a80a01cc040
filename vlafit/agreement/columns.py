"""Compare the names of a column's dimensions: which state an action is relative to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlafit.types import Embodiment, plain_unit

_COLUMN_WORDS = ("pos", "position", "action", "state", "target")


def plain_label(label: str) -> str:
    """Return a label without what only says which column it belongs to: `J1.pos` is `j1`."""
    words = label.lower().replace("/", ".").replace("-", "_").split(".")
    return ".".join(word for word in words if word not in _COLUMN_WORDS)


class Mispaired(NamedTuple):
    """Why an action cannot be relative to its state dimension, and the remedy."""

    text: str
    fix: str


NAMES_FIX = (
    "action i is made relative to state i: list the columns so that the same name stands at the same place "
    "in robot.state and robot.action, correct the labels, or leave this dimension absolute in robot.relative"
)
UNITS_FIX = "correct the units, convert one column by `scale` in the card, or leave the actions absolute"
CONTROL_FIX = "correct robot.control if the recorded actions are targets, or leave them as they are"


def mispaired(relative: Sequence[bool], robot: Embodiment) -> Mispaired | None:
    """Return why an action cannot be relative to its state dimension; None if all can.

    The codec subtracts state dimension i from action dimension i: both must have one name and one unit, where
    both sides state them, and the action must not be a difference already.
    """
    if not any(relative):
        return None
    if is_delta(robot.control):
        return Mispaired(
            f"control is {robot.control!r}, so that actions are differences already", CONTROL_FIX
        )
    if (
        robot.action.unit
        and robot.state.unit
        and plain_unit(robot.action.unit) != plain_unit(robot.state.unit)
    ):
        units = f"actions in {robot.action.unit!r} would be relative to a state in {robot.state.unit!r}"
        return Mispaired(units, UNITS_FIX)
    state, action = robot.state.labels, robot.action.labels
    for index, on in enumerate(relative):
        if not on or index >= min(len(state), len(action)):
            continue
        if plain_label(state[index]) == plain_label(action[index]):
            continue
        text = f"action {action[index]!r} would be relative to state {state[index]!r} (dimension {index})"
        places = [i for i, label in enumerate(state) if plain_label(label) == plain_label(action[index])]
        text += f"; state {action[index]!r} is dimension {places[0]}" if places else ""
        return Mispaired(text, NAMES_FIX)
    return None


def is_delta(control: str) -> bool:
    """Whether actions of this control mode are differences."""
    return control.lower().replace("-", "_").split("_")[0] in ("delta", "relative")


def by_name(mask: Sequence[bool], names: Sequence[str], wanted: Sequence[str]) -> tuple[bool, ...] | None:
    """Return the `mask` of dimensions called `names` in the order of `wanted`; None for other names."""
    have, want = ([plain_label(label) for label in labels] for labels in (names, wanted))
    if sorted(have) != sorted(want) or len(set(have)) != len(have) or len(mask) != len(have):
        return None
    return tuple(mask[have.index(label)] for label in want)


def by_number(dimensions: Sequence[str], named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return `dimensions` such as `action.j1` by number where `named` has the label: column -> labels."""
    numbers = {
        f"{column}.{label}": f"{column}.{number}"
        for column, labels in named.items()
        for number, label in enumerate(labels)
    }
    return tuple(numbers.get(name, name) for name in dimensions)
