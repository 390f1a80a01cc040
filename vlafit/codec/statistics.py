"""What a column's values look like, and the ways of normalising by it.

Statistics are fitted once, on training episodes, and saved in the checkpoint; both directions of the codec
use the same numbers. Everything here is float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlafit.errors import CodecError, DataError

Normalisation = Literal[
    "mean_std",
    "quantile",
    "openpi_mean_std",
    "openpi_quantile",
    "lerobot_mean_std",
    "lerobot_quantile",
    "lerobot_min_max",
    "identity",
]
"""How a column is normalised. The first two are ours, and keep odd dimensions from exploding; the others repeat
what the program did that trained a checkpoint."""

NEEDED: dict[Normalisation, tuple[str, str]] = {
    "mean_std": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "openpi_mean_std": ("mean", "std"),
    "openpi_quantile": ("q01", "q99"),
    "lerobot_mean_std": ("mean", "std"),
    "lerobot_quantile": ("q01", "q99"),
    "lerobot_min_max": ("min", "max"),
}
"""The statistics that each way of normalising reads; ours also read mean, min and max."""

LEROBOT_EPSILON = 1e-8  # LeRobot, normalize_processor.py: (x - mean) / (std + 1e-8); ranges of 0 become 1e-8
EPSILON = 1e-6  # openpi, transforms.py: (x - mean) / (std + 1e-6), (x - q01) / (q99 - q01 + 1e-6) * 2 - 1
FURTHEST = 50.0  # no recorded value is normalised to something further from the centre (see `Normaliser.fit`)
NEAR_CONSTANT = 1e-4  # a dimension whose whole range is below this, relative to max(1, |mean|), says nothing
NEAR_CONSTANT_SCALE = 1e-2  # what such a dimension is divided by, relative to max(1, |mean|)

ARRAYS = ("mean", "std", "q01", "q99", "min", "max")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of n values of d dimensions; every array is float64 [d], in the column's own units.

    `std` is the population's; `q01` and `q99` are true quantiles (linear interpolation between order
    statistics), not estimates from a histogram. Other programs' checkpoints may lack some: those are None, and
    `count` is 0 where it is not known.
    """

    count: int
    mean: NDArray[np.float64] | None = None
    std: NDArray[np.float64] | None = None
    q01: NDArray[np.float64] | None = None
    q99: NDArray[np.float64] | None = None
    min: NDArray[np.float64] | None = None
    max: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, values: ArrayLike, what: str = "values", labels: Sequence[str] = ()) -> "Statistics":
        """Return the statistics of `values` [n, d]; `what` and `labels` name the column in errors.

        Raises DataError where there are no values, or one is NaN or infinite.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] == 0:
            raise DataError(f"statistics of {what}: need an array [n, d], got shape {array.shape}")
        if len(array) == 0:
            raise DataError(f"statistics of {what}: there are no values; choose episodes that have frames")
        bad = ~np.isfinite(array)
        if bad.any():
            row, dimension = (int(i) for i in np.argwhere(bad)[0])
            label = f" ({labels[dimension]})" if dimension < len(labels) else ""
            raise DataError(
                f"statistics of {what}: {int(bad.sum())} values are not finite, the first is "
                f"{array[row, dimension]} in row {row}, dimension {dimension}{label}; "
                "mend or leave out the episode it comes from"
            )
        q01, q99 = np.quantile(array, [0.01, 0.99], axis=0)
        return cls(
            len(array), array.mean(axis=0), array.std(axis=0), q01, q99, array.min(axis=0), array.max(axis=0)
        )

    @property
    def dimensions(self) -> int:
        """Number of dimensions, d; 0 where nothing is known."""
        return max((len(array) for array in self._known().values()), default=0)

    def array(self, name: str) -> NDArray[np.float64]:
        """Return the statistic called `name`, which must be known. Raises CodecError."""
        found = self._known().get(name)
        if found is None:
            raise CodecError(
                f"the statistics have no {name}, but {', '.join(self._known()) or 'none'}; normalise in another "
                "way, or fit the codec on data"
            )
        return found

    def _known(self) -> dict[str, NDArray[np.float64]]:
        return {name: value for name in ARRAYS if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, object]:
        """Return plain numbers that `from_json` reads back bit for bit."""
        arrays: dict[str, object] = {name: value.tolist() for name, value in self._known().items()}
        return {"count": self.count} | dict.fromkeys(ARRAYS) | arrays

    @classmethod
    def from_json(cls, values: object, where: str) -> "Statistics":
        """Read what `to_json` wrote. Raises CodecError naming what is missing, surplus or malformed."""
        expected = {"count", *ARRAYS}
        if not isinstance(values, Mapping) or set(values) != expected:
            have = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise CodecError(f"{where}: statistics must have exactly {sorted(expected)}, there is {have}")
        try:
            given = {name: values[name] for name in ARRAYS if values[name] is not None}
            arrays = {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}
        except (TypeError, ValueError) as error:
            raise CodecError(f"{where}: statistics must be lists of numbers: {error}") from None
        shapes = {array.shape for array in arrays.values()}
        if shapes and (len(shapes) != 1 or len(next(iter(shapes))) != 1):
            raise CodecError(f"{where}: statistics must be lists of one length, got shapes {sorted(shapes)}")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise CodecError(f"{where}: statistics hold a value that is not finite")
        if not isinstance(values["count"], int):
            raise CodecError(f"{where}: count must be an integer, got {values['count']!r}")
        return cls(values["count"], **arrays)


@dataclass(frozen=True, eq=False)
class Normaliser:
    """An invertible map of each dimension: ``encode(x) = (x - offset) / scale * gain - shift``."""

    offset: NDArray[np.float64]
    scale: NDArray[np.float64]
    gain: float
    shift: float

    @classmethod
    def fit(cls, statistics: Statistics, method: Normalisation) -> "Normaliser":
        """Return the normaliser of `method`; nothing is clipped. Raises CodecError for statistics not known.

        Ours ("mean_std": z-scores; "quantile": q01 to q99 mapped to [-1, 1]) have floors. The divisor is never
        so small that a *recorded* value would land further than 50 from the centre: a dimension that hardly
        ever moves otherwise gives q99 - q01 near 0 and normalised values in the thousands. A dimension that is
        constant but for noise is divided by 1e-2 * max(1, |mean|), so that an unforeseen value at run time
        stays small too. Both stay invertible.
        """
        if method == "identity":
            nothing = np.zeros(1)
            return cls(nothing, nothing + 1.0, 1.0, 0.0)
        one, other = (statistics.array(name) for name in NEEDED[method])
        match method:
            case "mean_std" | "quantile":
                return cls._with_floors(statistics, method)
            case "openpi_mean_std":
                return cls(one, other + EPSILON, 1.0, 0.0)
            case "openpi_quantile":
                return cls(one, other - one + EPSILON, 2.0, 1.0)
            case "lerobot_mean_std":
                return cls(one, other + LEROBOT_EPSILON, 1.0, 0.0)
            case "lerobot_quantile" | "lerobot_min_max":
                return cls(one, np.where(other == one, LEROBOT_EPSILON, other - one), 2.0, 1.0)

    @classmethod
    def _with_floors(cls, statistics: Statistics, method: Literal["mean_std", "quantile"]) -> "Normaliser":
        mean, low, high = (statistics.array(name) for name in ("mean", "min", "max"))
        spread = high - low
        size = np.maximum(1.0, np.abs(mean))
        constant = spread <= NEAR_CONSTANT * size
        if method == "mean_std":
            scale = np.maximum(statistics.array("std"), spread / FURTHEST) + EPSILON
            return cls(mean, np.where(constant, NEAR_CONSTANT_SCALE * size, scale), 1.0, 0.0)
        q01, q99 = statistics.array("q01"), statistics.array("q99")
        scale = np.maximum(q99 - q01, 2 * spread / FURTHEST) + EPSILON
        wide = 2 * NEAR_CONSTANT_SCALE * size
        offset = np.where(constant, mean - wide / 2, q01)
        return cls(offset, np.where(constant, wide, scale), 2.0, 1.0)

    def encode(self, values: NDArray) -> NDArray[np.float64]:
        """Normalise [..., d]."""
        return (values - self.offset) / self.scale * self.gain - self.shift

    def decode(self, values: NDArray) -> NDArray[np.float64]:
        """Undo `encode`."""
        return (values.astype(np.float64) + self.shift) / self.gain * self.scale + self.offset
