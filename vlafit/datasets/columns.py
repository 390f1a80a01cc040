"""State and action columns: the parts that a card names, cut, scaled and put side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import ColumnCard
from vlafit.errors import ConfigError, DataError

_SLICED = re.compile(r"(?P<path>.+?)\s*\[\s*:\s*,\s*(?P<some>[^\]]*)\]")
_RANGE = re.compile(r"(-?\d+)?\s*:\s*(-?\d+)?(?:\s*:\s*(-?\d+))?")


@dataclass(frozen=True)
class Key:
    """A part of a column: where it is, and which of its dimensions to take."""

    path: str
    some: slice

    def width(self, dimensions: int) -> int:
        """Return how many of `dimensions` it takes."""
        return len(range(dimensions)[self.some])


def parse_key(text: str, where: str) -> Key:
    """Read "KEY", "KEY[:, 2]" or "KEY[:, :6]". Raises ConfigError for anything else in brackets."""
    if not text.endswith("]"):
        return Key(text, slice(None))
    match = _SLICED.fullmatch(text)
    some = match["some"].strip() if match else ""
    if match and re.fullmatch(r"-?\d+", some):
        number = int(some)
        return Key(match["path"], slice(number, number + 1 or None))
    bounds = _RANGE.fullmatch(some)
    if match and bounds and bounds[3] != "0":
        return Key(match["path"], slice(*(int(part) if part else None for part in bounds.groups())))
    raise ConfigError(f'{where}: {text!r} is no key; dimensions are taken as in "KEY[:, 2]" or "KEY[:, :6]"')


def part(raw: NDArray, key: str, column: ColumnCard, name: str, where: str) -> NDArray:
    """Return one part of a column as numbers [T, d] (a part [T] has one dimension), cut as its key says.

    Raises DataError if a value is not finite in float32, or is a whole number of which the card tells no
    scale.
    """
    parsed = parse_key(key, where)
    if raw.ndim == 1:
        raw = raw[:, None]
    if raw.ndim != 2 or raw.dtype.kind not in "fiub":
        raise DataError(
            f"{where}: {parsed.path} is {raw.dtype} {raw.shape}, a {name} column is float [T] or [T, d]"
        )
    require_scale(raw, column, name, parsed.path, where)
    if not parsed.width(raw.shape[1]):
        raise DataError(f"{where}: {key} takes none of its {raw.shape[1]} dimensions")
    values = raw[:, parsed.some]
    require_finite(values, key, where)
    return values


def require_scale(raw: NDArray, column: ColumnCard, name: str, key: str, where: str) -> None:
    """Raise DataError for whole numbers of which the card does not say what one is worth."""
    if raw.dtype.kind != "f" and not column.scale:
        raise DataError(
            f"{where}: {key} is {raw.dtype} {raw.shape}, whole numbers; a {name} column is float [T, d]. If "
            f"they are meant, say what one is worth in each of the card's {column.dimensions} dimensions: "
            f"robot.{name}.scale"
        )


def require_finite(values: NDArray, key: str, where: str) -> None:
    """Raise DataError naming the first value [T, d] that is not finite in float32."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        bad = ~np.isfinite(values.astype(np.float32))
    if bad.any():
        step, dimension = (int(i) for i in np.argwhere(bad)[0])
        value = values[step, dimension]
        beyond = ", which is beyond float32 (3.4e38)" if np.isfinite(value) else ""
        raise DataError(
            f"{where}: {key} holds {value} at step {step}, dimension {dimension}{beyond}; "
            "fix the file or leave the demonstration out"
        )


def join(parts: Sequence[NDArray], column: ColumnCard, name: str, where: str) -> NDArray[np.float32]:
    """Return the parts of a column side by side, scaled, [T, dimensions], read-only.

    The caller has made sure that the parts have one length.
    """
    width = sum(values.shape[1] for values in parts)
    if width != column.dimensions:
        widths = ", ".join(f"{key} {p.shape[1]}" for key, p in zip(column.keys, parts, strict=True))
        raise DataError(
            f"{where}: {name} has {width} dimensions ({widths}), the card says {column.dimensions}"
        )
    joined = np.concatenate(
        [scaled(p, column, start) for p, start in zip(parts, _starts(parts), strict=True)], 1
    )
    joined.flags.writeable = False
    return joined


def scaled(values: NDArray, column: ColumnCard, first: int = 0) -> NDArray[np.float32]:
    """Return values [T, d] as float32, with the column's scale and offset of dimensions `first` on."""
    if not column.scale and not column.offset:
        return values.astype(np.float32)
    some = slice(first, first + values.shape[1])
    made = values.astype(np.float64)
    if column.scale:
        made = made * np.asarray(column.scale[some])
    if column.offset:
        made = made + np.asarray(column.offset[some])
    with np.errstate(over="ignore"):
        small = made.astype(np.float32)
    if np.isinf(small).any():
        step, dimension = (int(i) for i in np.argwhere(np.isinf(small))[0])
        raise DataError(
            f"scale and offset of the card make {made[step, dimension]} of {values[step, dimension]} at step "
            f"{step}, dimension {first + dimension} of {', '.join(column.keys)}, which is beyond float32 "
            "(3.4e38); correct them"
        )
    return small


def _starts(parts: Sequence[NDArray]) -> list[int]:
    return [sum(p.shape[1] for p in parts[:n]) for n in range(len(parts))]
