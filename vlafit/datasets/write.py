"""Write a data card as TOML, each guess marked by a comment."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vlafit import config
from vlafit.datasets import layouts
from vlafit.datasets.card import Card


def card_text(card: Card, guesses: Mapping[str, str] | None = None) -> str:
    """Return the TOML text of a card; `vlafit.datasets.load.build` reads it back equal, `file` aside.

    Fields with their default value are left out. `guesses` maps a dotted key, a list's items by number
    (robot.cameras.0.name), to the comment above it. Raises KeyError for a key that the card does not write.
    """
    values = _chosen(card)
    values.pop("file", None)
    section = values.pop("section", {})
    if section:
        values[layouts.section_name(card.layout)] = section
    remaining = dict(guesses or {})
    lines: list[str] = []
    table, counts = "", dict[str, int]()
    for line in config.dump(values).splitlines():
        header = re.fullmatch(r"(\[\[?)([^\]]+)\]\]?", line)
        if header and line.startswith("["):
            table = header[2]
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}.{counts[table]}"
        key = line.split(" = ", 1)[0]
        dotted = f"{table}.{key}" if table else key
        if not header and dotted in remaining:
            lines.append(f"# GUESS: {remaining.pop(dotted)}")
        lines.append(line)
    if remaining:
        raise KeyError(f"guesses about keys that the card does not write: {sorted(remaining)}")
    return "\n".join(lines) + "\n"


def _chosen(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not their default, dataclasses inside as tables."""
    chosen = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if item == default and default is not dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(item):
            item = _chosen(item)
            if not item:
                continue
        elif isinstance(item, tuple) and item and all(dataclasses.is_dataclass(one) for one in item):
            item = tuple(_chosen(one) for one in item)
        chosen[field.name] = item
    return chosen
