"""Compare the names of a column's dimensions: which state an action is relative to."""

from collections.abc import Mapping, Sequence

from vlafit.types import Embodiment

_COLUMN_WORDS = ("pos", "position", "action", "state", "target")


def plain_label(label: str) -> str:
    """Return a label without what only says which column it belongs to: `J1.pos` is `j1`."""
    words = label.lower().replace("/", ".").replace("-", "_").split(".")
    return ".".join(word for word in words if word not in _COLUMN_WORDS)


def mispaired(relative: Sequence[bool], robot: Embodiment) -> str:
    """Return the first relative action whose state dimension has another name, as text; "" if none has.

    The codec subtracts state dimension i from action dimension i. Nothing is compared where a side has no
    names.
    """
    state, action = robot.state.labels, robot.action.labels
    for index, on in enumerate(relative):
        if not on or index >= min(len(state), len(action)):
            continue
        if plain_label(state[index]) == plain_label(action[index]):
            continue
        text = f"action {action[index]!r} would be relative to state {state[index]!r} (dimension {index})"
        places = [i for i, label in enumerate(state) if plain_label(label) == plain_label(action[index])]
        return text + (f"; state {action[index]!r} is dimension {places[0]}" if places else "")
    return ""


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


PAIR_FIX = (
    "action i is made relative to state i: list the columns so that the same name stands at the same place "
    "in robot.state and robot.action, correct the labels, or leave this dimension absolute in robot.relative"
)
