"""Check the arguments of public functions where they enter: type, range, and that numbers are finite.

An error is a ConfigError that names the argument, its value and what is allowed.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from vlafit.errors import ConfigError, shown_whole
from vlafit.observations import is_unicode, short


def whole(where: str, value: object, least: int, most: int) -> int:
    """Return a whole number, of Python or numpy, as Python's own."""
    if not isinstance(value, bool) and isinstance(value, int | np.integer) and least <= value <= most:
        return int(value)
    raise _refused(where, f"a whole number from {shown_whole(least)} to {shown_whole(most)}", value)


def number(where: str, value: object, least: float, most: float, *, above: bool = False) -> float:
    """Return a finite number; one that must be `above` the least may not be equal to it."""
    if not isinstance(value, bool) and isinstance(value, int | float | np.integer | np.floating):
        from_least = value > least if above else value >= least
        if from_least and value <= most and math.isfinite(value):
            return float(value)
    span = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
    raise _refused(where, f"a number {span}", value)


def text(where: str, value: object, *, empty: bool = True) -> str:
    """Return a text of valid Unicode; it may be empty unless told otherwise."""
    if isinstance(value, str) and is_unicode(value) and (empty or value.strip()):
        return str(value)
    raise _refused(where, "a text" if empty else "a text that is not empty", value)


def flag(where: str, value: object) -> bool:
    """Return True or False. Other values, which Python would take for one of them, are refused."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _refused(where, "True or False", value)


def one_of(where: str, value: object, names: Collection[str]) -> str:
    """Return a text that is one of `names`."""
    if isinstance(value, str) and value in names:
        return value
    raise _refused(where, f"one of {', '.join(map(repr, names))}", value)


def texts(where: str, value: object) -> tuple[str, ...]:
    """Return a list of texts. One text is not taken for a list of its letters."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return tuple(text(f"{where}[{i}]", one) for i, one in enumerate(value))
    raise _refused(where, "a list of texts", value)


def path(where: str, value: object) -> str | Path:
    """Return a text or a path that is not empty."""
    if isinstance(value, PathLike):
        value = fspath(value)
        return Path(text(where, value, empty=False))
    if isinstance(value, str):
        return text(where, value, empty=False)
    raise _refused(where, "a path, or a name (a text)", value)


def table(where: str, value: object) -> dict[str, str]:
    """Return a map of texts to texts."""
    if not isinstance(value, Mapping):
        raise _refused(where, "a map of texts to texts", value)
    return {text(f"{where}: a key", key): text(f"{where}[{key!r}]", one) for key, one in value.items()}


def _refused(where: str, allowed: str, value: object) -> ConfigError:
    return ConfigError(f"{where} must be {allowed}, not {short(value)}")
