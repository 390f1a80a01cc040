"""Statistics of state and action columns.

They are fitted once, on training episodes, and saved in the checkpoint; `normaliser` normalises by them.
Everything here is float64.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlafit.errors import CodecError, DataError, quoted

QUANTILE_VALUES = 2**26  # float64 values held at once while quantiles are taken, 0.5 GB

ARRAYS = ("mean", "std", "q01", "q99", "min", "max")
OPTIONAL = ARRAYS[2:]  # what other programs may not have recorded


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of n values of d dimensions; every array is float64 [d], in the column's own units.

    Those of the actions of another program's chunks may be of each step apart: [t, d].

    `std` is the population's; `q01` and `q99` are true quantiles (linear interpolation between order
    statistics), not estimates from a histogram.

    Statistics that another program recorded may lack quantiles, and the range; what it did not write is
    None, and a `count` that it did not write is 0.
    """

    count: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    q01: NDArray[np.float64] | None = None
    q99: NDArray[np.float64] | None = None
    min: NDArray[np.float64] | None = None
    max: NDArray[np.float64] | None = None

    @property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and greatest value [d], or the outer quantiles without them; NaN where that is not known."""
        low, high = (self.q01, self.q99) if self.min is None or self.max is None else (self.min, self.max)
        unknown = np.full(self.dimensions, np.nan)
        return unknown if low is None else low, unknown if high is None else high

    @classmethod
    def of(cls, values: ArrayLike, what: str = "values", labels: Sequence[str] = ()) -> "Statistics":
        """Return the statistics of `values` [n, d]; `what` and `labels` name the column in errors.

        Raises DataError if there are no values, or one is NaN or infinite.
        """
        return cls.of_blocks([np.asarray(values)], what, labels)

    @classmethod
    def of_blocks(
        cls, blocks: Iterable[NDArray], what: str = "values", labels: Sequence[str] = ()
    ) -> "Statistics":
        """Return the statistics of the rows of all `blocks` [n, d], bit for bit those of one array of them.

        `blocks` is iterated several times and never held together, so that a dataset may be larger than the
        memory: of the values only some dimensions are kept at a time, for the quantiles.
        """
        sums = _Sums(what, labels)
        for block in blocks:
            sums.add(block)
        if sums.count == 0:
            raise DataError(f"statistics of {what}: there are no values; choose episodes that have frames")
        width, count = len(sums.total), sums.count
        if width == 1:  # one dimension is summed in pairs by numpy, and must be whole
            whole = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
            mean, std = whole.mean(axis=0), whole.std(axis=0)
        else:
            mean = sums.total / count
            squares = np.zeros(0)
            for block in blocks:
                centred = np.asarray(block, dtype=np.float64) - mean
                squares = _add_rows(squares, centred * centred)
            std = np.sqrt(squares / count)
        q01, q99 = np.empty(width), np.empty(width)
        at_once = max(1, QUANTILE_VALUES // count)
        for first in range(0, width, at_once):
            some = slice(first, first + at_once)
            columns = np.concatenate([np.asarray(block[:, some], dtype=np.float64) for block in blocks])
            q01[some], q99[some] = np.quantile(columns, [0.01, 0.99], axis=0)
        return cls(count, mean, std, q01, q99, sums.least, sums.most)

    @property
    def dimensions(self) -> int:
        """Number of dimensions, d."""
        return self.mean.shape[-1]

    @property
    def steps(self) -> int:
        """Number of steps, t, that have statistics of their own; 0 where there is one set for all."""
        return len(self.mean) if self.mean.ndim == 2 else 0

    @property
    def overall(self) -> "Statistics":
        """Those of all steps together, where quantiles are the outermost ones of any step."""
        if not self.steps:
            return self
        mean = self.mean.mean(axis=0)
        spread = np.sqrt((self.std**2 + (self.mean - mean) ** 2).mean(axis=0))
        outermost = {
            name: None if array is None else take(array, axis=0)
            for name, take in (("q01", np.min), ("q99", np.max), ("min", np.min), ("max", np.max))
            for array in (getattr(self, name),)
        }
        return Statistics(self.count, mean, spread, **outermost)

    def only(self, dimensions: NDArray[np.int64]) -> "Statistics":
        """Return those of some dimensions."""
        arrays = {
            name: None if array is None else array[..., dimensions]
            for name in ARRAYS
            for array in (getattr(self, name),)
        }
        return Statistics(self.count, **arrays)  # type: ignore[arg-type]  # mean and std are always there

    def array(self, name: str) -> NDArray[np.float64]:
        """Return the statistic called `name`. Raises CodecError where it was not recorded."""
        array = getattr(self, name)
        if array is None:
            have = ", ".join(n for n in ARRAYS if getattr(self, n) is not None)
            raise CodecError(
                f"the statistics hold no {name}, but {have}; normalise by those, or fit them anew"
            )
        return array

    def to_json(self) -> dict[str, object]:
        """Return plain numbers that `from_json` reads back bit for bit."""
        values: dict[str, object] = {"count": self.count}
        for name in ARRAYS:
            array = getattr(self, name)
            values[name] = None if array is None else array.tolist()
        return values

    @classmethod
    def from_json(cls, values: object, where: str) -> "Statistics":
        """Read what `to_json` wrote. Raises CodecError naming what is missing, surplus or malformed."""
        expected = {"count", *ARRAYS}
        if not isinstance(values, Mapping) or set(values) != expected:
            have = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise CodecError(f"{where}: statistics must have exactly {sorted(expected)}, there is {have}")
        try:
            given = [n for n in ARRAYS if values[n] is not None or n not in OPTIONAL]
            for name in given:
                _require_numbers(values[name], name)
            arrays = {name: np.asarray(values[name], dtype=np.float64) for name in given}
        except (TypeError, ValueError) as error:
            raise CodecError(f"{where}: statistics must be lists of numbers: {error}") from None
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2):
            raise CodecError(f"{where}: statistics must be lists of one length, got shapes {sorted(shapes)}")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise CodecError(f"{where}: statistics hold a value that is not finite")
        count = values["count"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise CodecError(f"{where}: count must be a whole number from 0, got {quoted(count)}")
        if (arrays["std"] < 0).any():
            raise CodecError(f"{where}: std is negative: {quoted(arrays['std'].tolist())}")
        for low, high in (("q01", "q99"), ("min", "max")):
            if low in arrays and high in arrays and (arrays[low] > arrays[high]).any():
                at = tuple(int(i) for i in np.argwhere(arrays[low] > arrays[high])[0])
                raise CodecError(
                    f"{where}: {low} is {arrays[low][at]:g} and {high} {arrays[high][at]:g} "
                    f"in dimension {at[-1]}"
                )
        return cls(values["count"], **arrays)


def _require_numbers(values: object, name: str) -> None:
    """Raise TypeError naming the first of nested lists that is no number: numpy reads texts as such."""
    if isinstance(values, list):
        for value in values:
            _require_numbers(value, name)
    elif isinstance(values, bool) or not isinstance(values, int | float):
        raise TypeError(f"{name} holds {quoted(values)}")


class _Sums:
    """The count, sum and range of rows, and a check of each."""

    def __init__(self, what: str, labels: Sequence[str]) -> None:
        self.what, self.labels = what, labels
        self.count = 0
        self.total = self.least = self.most = np.zeros(0)

    def add(self, block: NDArray) -> None:
        """Count the rows of `block` [n, d]. Raises DataError if it has another shape, or is not finite."""
        array = np.asarray(block, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] == 0:
            raise DataError(f"statistics of {self.what}: need an array [n, d], got shape {array.shape}")
        if self.count and array.shape[1] != len(self.total):
            widths = f"{len(self.total)} and {array.shape[1]}"
            raise CodecError(
                f"{self.what}s to take statistics of have {widths} dimensions; they must be alike"
            )
        if len(array) == 0:
            return
        bad = ~np.isfinite(array)
        if bad.any():
            row, dimension = (int(i) for i in np.argwhere(bad)[0])
            label = f" ({self.labels[dimension]})" if dimension < len(self.labels) else ""
            raise DataError(
                f"statistics of {self.what}: {int(bad.sum())} values are not finite, the first is "
                f"{array[row, dimension]} in row {self.count + row}, dimension {dimension}{label}; "
                "fix or leave out the episode it comes from"
            )
        least, most = array.min(axis=0), array.max(axis=0)
        self.least = np.minimum(self.least, least) if self.count else least
        self.most = np.maximum(self.most, most) if self.count else most
        self.total = _add_rows(self.total, array)
        self.count += len(array)


def _add_rows(total: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `total` [d] (empty at the start) plus all rows [n, d], in the order in which numpy adds them."""
    return np.add.reduce(np.concatenate([total[None], rows]) if len(total) else rows, axis=0)
