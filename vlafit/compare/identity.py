"""What makes two comparisons, or two sweeps, the same: plain values, their hash, and how they differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.errors import ConfigError, VlafitError


def flat(values: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's fields by their dotted names as JSON has them, those that are named left out."""
    return dict(_flat(values, without))


def _flat(values: Mapping[str, Any], without: Sequence[str], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        dotted = f"{at}{name}"
        if dotted in without:
            continue
        if isinstance(value, Mapping) and not at:
            yield from _flat(value, without, f"{dotted}.")
        else:
            yield dotted, json.loads(json.dumps(value))


def digest(values: Mapping[str, Any]) -> str:
    """Return the hash that names an identity."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_same(folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless `folder` holds the comparison (or sweep) asked for."""
    if digest(before) == digest(now):
        return
    changed = [*_differences(before, now), *_differences(before.get("recipe", {}), now.get("recipe", {}))]
    raise ConfigError(
        f"{folder} holds another {what} (its hash is {digest(before)[:12]}, this one's "
        f"{digest(now)[:12]}): {'; '.join(changed)}. Go on with what it began with, or choose another --out"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if one != other and key != "recipe":
            yield f"{key} was {_short(one)}, is {_short(other)}"


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:12]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def settle(path: Path, what: str, now: Mapping[str, Any]) -> None:
    """Write what a folder is for into `path`, or require that it says the same already.

    Raises ConfigError where it is for something else, or holds other files.
    """
    folder = path.parent
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise VlafitError(f"{path}: damaged ({error}); choose another --out") from error
        require_same(folder, what, before, now)
        return
    if folder.is_dir() and not files.is_empty(folder):
        raise ConfigError(f"{folder} is not empty and holds no {what}; choose another folder with --out")
    files.write_atomic(path, json.dumps(now, indent=2) + "\n")
