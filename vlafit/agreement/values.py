"""One side's statement about the robot, one compared item, and the agreement as a whole."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from vlafit import files
from vlafit.errors import ConfigError, EmbodimentError, brief
from vlafit.files import parse_object, plain_text
from vlafit.types import ColumnForm, Embodiment

Status = Literal["same", "chosen", "assumed", "differs", "conflict"]
Role = Literal["dataset", "checkpoint", "protocol"]
DATA: tuple[Role, Role] = ("dataset", "checkpoint")
FILE = "agreement.json"
"""Name of the agreement's file in a run's folder and in a checkpoint."""
FORMAT = 1
AS_STORED = "as in the files"
CONVERSIONS = {"state conversion": "states", "action conversion": "actions"}
"""Items that say what a card does to a column when it is read -> what the column holds."""
PLACEHOLDER = "CAMERA"
"""Stands in a proposed `adapt.cameras` for the camera of a slot that the names do not tell."""


class Forms(NamedTuple):
    """What a policy learns of states and actions, where that is not the columns themselves."""

    state: ColumnForm = ColumnForm()
    action: ColumnForm = ColumnForm()


@dataclass(frozen=True)
class Party:
    """One side's statement about the robot."""

    role: Role
    name: str
    embodiment: Embodiment | None
    """None where the side says nothing about dimensions and control."""
    relative: tuple[bool, ...] | None = None
    """For each action dimension: whether actions are relative to the state at the chunk's start. Empty: none
    is. None: it does not say."""
    slots: tuple[str, ...] = ()
    """Camera slots of a checkpoint, in order; "" is a slot that was always empty."""
    frame_sizes_known: bool = True
    """Whether the cameras' shapes are those of the recorded frames, and not of the policy's own images."""
    room: tuple[int, int] | None = None
    """Most state and action dimensions of a checkpoint's policy; None if unknown."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Name of a camera of a dataset -> where its files have the frames."""
    conversions: tuple[str, ...] = ()
    """Changes that a checkpoint's program made to states or actions inside the policy; vlafit makes none."""
    relative_inside: str = ""
    """Which of a checkpoint's settings makes actions relative inside the policy, and which ones."""
    forms: Forms | None = None
    """What is learned of states and actions; None: it does not say."""

    @property
    def title(self) -> str:
        """The side's role and name, for messages."""
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True)
class Item:
    """One point that the sides must agree on."""

    name: str
    sides: Mapping[str, str]
    """Role ("recipe", "run" and "launcher" among them) -> its statement; who says nothing is left out."""
    value: str
    """The value that holds; empty in a conflict."""
    status: Status
    reason: str = ""
    """Why this value holds."""
    fix: str = ""
    """How to solve a conflict."""
    accept: tuple[str, ...] = ()
    """Options of the command line that accept the difference, if one choice is usual."""
    short: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Long statement, or value -> what a console shows in its place; not written into files."""

    def to_json(self) -> dict[str, Any]:
        """Return the item as agreement.json holds it."""
        content = asdict(self) | {"sides": dict(self.sides), "accept": list(self.accept)}
        del content["short"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Item":
        """Return the item that `to_json` wrote. Raises TypeError or ValueError for anything else."""
        item = cls(**{**content, "accept": tuple(content.get("accept", ()))})
        if not isinstance(item.sides, dict) or item.short:
            raise TypeError(f"sides {item.sides!r}, short {item.short!r}")
        texts = (item.name, item.value, item.status, item.reason, item.fix, *item.accept)
        for text in (*texts, *item.sides, *item.sides.values()):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is no text")
        if item.status not in get_args(Status):
            raise ValueError(f"status {item.status!r}")
        return item


@dataclass(frozen=True)
class Agreement:
    """Every item, and the decisions that a codec is built from."""

    items: tuple[Item, ...]
    cameras: tuple[str, ...]
    """The dataset's camera for each slot of the policy; "" leaves a slot empty."""
    relative: tuple[bool, ...]
    """For each action dimension: whether actions are relative. Empty: none is."""

    columns: tuple[Role, Role] = DATA
    """The sides that have a column in tables."""
    forms: Forms = field(default_factory=Forms)
    """What is learned of states and actions."""

    @property
    def heads(self) -> tuple[str, str, str, str, str]:
        """Column heads of `rows`."""
        return ("item", *self.columns, "holds", "why")

    @property
    def conflicts(self) -> tuple[Item, ...]:
        """Items on which the sides contradict one another."""
        return tuple(item for item in self.items if item.status == "conflict")

    @property
    def chosen(self) -> tuple[Item, ...]:
        """Items on which the recipe chooses a side."""
        return tuple(item for item in self.items if item.status == "chosen")

    def require(self, title: str = "dataset and checkpoint") -> None:
        """Raise EmbodimentError naming every conflict, both sides of it and its remedy."""
        if not self.conflicts:
            return
        lines = []
        for fix, alike in groupby(self.conflicts, key=lambda item: item.fix):
            for item in alike:
                sides = "; ".join(f"{role}: {item.short.get(t, t)}" for role, t in item.sides.items())
                lines.append(f"  {item.name}: {sides}")
            lines += [f"    fix: {fix}"] if fix else []
        points = f"{len(self.conflicts)} point{'s' * (len(self.conflicts) > 1)}"
        raise EmbodimentError(f"{title} disagree on {points}:\n" + "\n".join(lines) + self._how_to_accept())

    def _how_to_accept(self) -> str:
        """Return the options that accept every conflict at once; "" if one of them needs a choice."""
        if not all(item.accept for item in self.conflicts):
            return ""
        given = list(dict.fromkeys(option for item in self.conflicts for option in item.accept))
        sections = list(dict.fromkeys(map(_section, given)))
        options = " ".join(sorted(given, key=lambda option: sections.index(_section(option))))
        left = f", with a camera of the dataset in the place of each {PLACEHOLDER}"
        unknown = any(option.endswith(f" {PLACEHOLDER}") for option in options.split(" --"))
        return f"\nIf all of this is meant, add to the command{left if unknown else ''}:\n  {options}"

    def with_items(self, items: Sequence[Item]) -> "Agreement":
        """Return the agreement with further items."""
        return replace(self, items=(*self.items, *items))

    def for_embodiment(self, name: str) -> "Agreement":
        """Return the agreement with remedies that are for one embodiment of a run on several."""
        section = f"adapt.embodiments.{name}"

        def own(option: str) -> str:
            known = option.startswith(f"--{section}.")
            return option if known else option.replace("adapt.", f"{section}.", 1)

        items = [
            replace(
                item,
                fix=item.fix.replace("[adapt]", f"[{section}]"),
                accept=tuple(map(own, item.accept)),
            )
            for item in self.items
        ]
        return replace(self, items=tuple(items))

    def rows(self, *, short: bool = False) -> list[tuple[str, str, str, str, str]]:
        """Return (item, one side, the other, value, why) for tables; a further side is in the third.

        `short`: as a console shows them, long statements shortened, one row for what is the same of state and
        action, and remedies left out, which are said below the table.
        """
        rows, fix = [], ""
        for item in _state_with_action(self.items) if short else self.items:
            first, second = (item.sides.get(role, "") for role in self.columns)
            others = [f"{role}: {text}" for role, text in item.sides.items() if role not in self.columns]
            why = item.reason or ("as above" if item.fix and item.fix == fix else item.fix)
            if short and item.status == "conflict":
                why = "see below"
            fix = item.fix
            status = item.status if item.status != "same" else ""
            said = (first, second or ", ".join(others), item.value)
            cells = tuple(item.short.get(text, text) for text in said) if short else said
            rows.append((item.name, *cells, ": ".join(filter(None, (status, why)))))
        return rows

    def to_json(self) -> str:
        """Return the content of agreement.json."""
        content = {
            "format": FORMAT,
            "items": [item.to_json() for item in self.items],
            "cameras": list(self.cameras),
            "relative": list(self.relative),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write agreement.json into `folder`."""
        files.write_atomic(folder / FILE, self.to_json())


def _section(option: str) -> str:
    """Return the recipe's section of an option such as ``--policy.config.state_dim 26``."""
    return option.split()[0].rpartition(".")[0]


def _state_with_action(items: Sequence[Item]) -> list[Item]:
    """Return the items, with one for state and action where all but the name is the same."""

    def content(item: Item) -> tuple[Any, ...]:
        return item.sides, item.value, item.status, item.reason, item.fix

    by_name = {item.name: item for item in items}
    shown = {}
    for item in items:
        action = by_name.get(re.sub(r"\bstate\b", "action", item.name), item)
        if action is not item and content(action) == content(item):
            shown[action.name] = ""
            shown[item.name] = re.sub(r"\bstate\b", "state and action", item.name)
    return [replace(item, name=name) for item in items if (name := shown.get(item.name, item.name))]


def join(agreements: Mapping[str, Agreement]) -> Agreement:
    """Return the agreement of a run on several embodiments; that of a single one as it is.

    Items on which all are alike are there once, others begin with the embodiment's name. Cameras and relative
    actions are empty: the items, and codec.json, have those of each.
    """
    if len(agreements) == 1:
        return next(iter(agreements.values()))
    every = list(agreements.values())
    common = [item for item in every[0].items if all(item in other.items for other in every[1:])]
    own = [
        replace(item, name=f"{name}: {item.name}")
        for name, agreement in agreements.items()
        for item in agreement.items
        if item not in common
    ]
    return Agreement((*common, *own), (), ())


def read(folder: Path) -> Agreement | None:
    """Return the agreement that lies in `folder`; None where a run or checkpoint is older than agreements.

    Raises ConfigError for a damaged file.
    """
    content = read_content(folder)
    return None if content is None else from_content(content, folder / FILE)


def read_content(folder: Path) -> dict[str, Any] | None:
    """Return the content of the agreement.json in `folder`; None where there is none.

    Raises ConfigError for a file that holds no JSON object.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return parse_object(plain_text(path))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def from_content(content: Mapping[str, Any], path: Path) -> Agreement:
    """Return the agreement of an agreement.json. Raises ConfigError for one that vlafit has not written."""
    try:
        if content["format"] != FORMAT:
            raise ConfigError(f"{path}: format {content['format']!r}, this version reads {FORMAT}")
        items = tuple(map(Item.from_json, content["items"]))
        if not items:
            raise ValueError("its items were deleted")
        cameras, relative = content["cameras"], content["relative"]
        for name, values, kind in (("cameras", cameras, str), ("relative", relative, bool)):
            if not isinstance(values, list) or not all(type(value) is kind for value in values):
                raise TypeError(f"{name} {values!r}")
        return Agreement(items, tuple(cameras), tuple(relative))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not an agreement as vlafit writes it ({brief(error)}); copy it again, or delete "
        "it: data are then compared with less"
    )
