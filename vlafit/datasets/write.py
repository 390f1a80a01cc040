"""Write a data card as TOML, each guess marked by a comment."""

import dataclasses
import re
from collections.abc import Mapping, Set
from typing import Any

from vlafit import config
from vlafit.datasets import layouts
from vlafit.datasets.card import Card
from vlafit.errors import printable


def card_text(
    card: Card, guesses: Mapping[str, str] | None = None, missing: Mapping[str, str] | None = None
) -> str:
    """Return the TOML text of a card; `vlafit.datasets.load.build` reads it back equal, `file` aside.

    Fields with their default value are left out. `guesses` and `missing` map a dotted key, a list's items by
    number (robot.cameras.0.name), to the comment above it. Raises KeyError for a key that the card lacks.
    """
    remaining = {key: _comment(f"GUESS: {reason}") for key, reason in (guesses or {}).items()}
    remaining |= {key: _comment(f"FILL IN: {reason}") for key, reason in (missing or {}).items()}
    table_name = layouts.section_name(card.layout)
    values = _chosen(card, "", {key.replace(f"{table_name}.", "section.", 1) for key in remaining})
    values.pop("file", None)
    section = values.pop("section", {})
    if section:
        values[table_name] = section
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
            lines.append(remaining.pop(dotted))
        lines.append(line)
    if remaining:
        raise KeyError(f"guesses about keys that the card does not write: {sorted(remaining)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return a comment of one line, whatever a file's names hold."""
    return f"# {printable(' '.join(text.split()))}"


def _chosen(value: Any, prefix: str, keep: Set[str]) -> dict[str, Any]:
    """Return the fields of a dataclass that are not their default or are in `keep`, tables inside as such."""
    chosen = {}
    for field in dataclasses.fields(value):
        item, dotted = getattr(value, field.name), f"{prefix}{field.name}"
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kept = any(key == dotted or key.startswith(f"{dotted}.") for key in keep)
        if item == default and default is not dataclasses.MISSING and not kept:
            continue
        if dataclasses.is_dataclass(item):
            item = _chosen(item, f"{dotted}.", keep)
            if not item:
                continue
        elif isinstance(item, tuple) and item and all(dataclasses.is_dataclass(one) for one in item):
            item = tuple(_chosen(one, f"{dotted}.{n}.", keep) for n, one in enumerate(item))
        chosen[field.name] = item
    return chosen
