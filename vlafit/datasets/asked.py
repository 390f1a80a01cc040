"""Check what a store is asked for: numbers of episodes and steps, lengths of chunks."""

import operator
from collections.abc import Iterable
from typing import Any

from vlafit.errors import DataError, quoted

LONGEST = 100_000  # steps of a chunk or a history; a slip beyond would fill the memory


def whole_number(value: Any, what: str, least: int, most: int, remedy: str = "") -> int:
    """Return `value` as an int from `least` to `most`. Raises DataError beginning with `what`."""
    if type(value) is int and least <= value <= most:
        return value
    try:
        number = None if _is_truth(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise DataError(f"{what} must be a whole number from {least} to {most}, not {quoted(value)}{remedy}")
    return number


def several(values: Any, what: str) -> list[Any]:
    """Return `values` as a list. Raises DataError beginning with `what` if they are none."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise DataError(f"{what} must be a list of whole numbers, not {quoted(values)}")
    return list(values)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
