"""Normalise states and actions by their statistics, in the ways of this and other programs.

Both directions of the codec use the same numbers. Everything here is float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.statistics import Statistics

Normalisation = Literal[
    "mean_std",
    "quantile",
    "min_max",
    "lerobot_mean_std",
    "lerobot_quantile",
    "lerobot_min_max",
    "groot_quantile",
    "groot_min_max",
    "openvla_quantile",
    "openvla_min_max",
    "nvidia_quantile",
    "nvidia_min_max",
    "nvidia_mean_std",
    "nvidia_mean_std_clipped",
    "identity",
]
"""How a column is normalised. The first three have floors that keep nearly constant dimensions from
exploding (the first two are openpi's); the others repeat what LeRobot did when it trained a checkpoint.
GR00T's are clipped to [-1, 1] in both directions, and constant dimensions are 0 (NVIDIA's own, `nvidia_*`,
take nearly constant ones for constant, too); OpenVLA's, and NVIDIA's z-scores of actions, are clipped where
they are encoded only. OpenVLA's may leave some dimensions as they are."""

NEEDED: dict[Normalisation, tuple[str, str]] = {
    "mean_std": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
    "lerobot_mean_std": ("mean", "std"),
    "lerobot_quantile": ("q01", "q99"),
    "lerobot_min_max": ("min", "max"),
    "groot_quantile": ("q01", "q99"),
    "groot_min_max": ("min", "max"),
    "openvla_quantile": ("q01", "q99"),
    "openvla_min_max": ("min", "max"),
    "nvidia_quantile": ("q01", "q99"),
    "nvidia_min_max": ("min", "max"),
    "nvidia_mean_std": ("mean", "std"),
    "nvidia_mean_std_clipped": ("mean", "std"),
}
"""The statistics that each way of normalising reads; the first two also look at min and max."""

FLOORED: Mapping[Normalisation, Normalisation] = {
    "lerobot_mean_std": "mean_std",
    "lerobot_quantile": "quantile",
    "lerobot_min_max": "min_max",
}
"""Another program's way of normalising -> vlafit's with a floor, which fitted statistics use."""

OPENVLA: tuple[Normalisation, ...] = ("openvla_quantile", "openvla_min_max")
OPENVLA_EPSILON = 1e-8  # openvla-oft, data_utils.py: 2 * (x - low) / (high - low + 1e-8) - 1
LEROBOT_EPSILON = 1e-8  # LeRobot, normalize_processor.py: (x - mean) / (std + 1e-8); ranges of 0 become 1e-8
EPSILON = 1e-6  # openpi, transforms.py: (x - mean) / (std + 1e-6), (x - q01) / (q99 - q01 + 1e-6) * 2 - 1
FURTHEST = 50.0  # no recorded value is normalised to something further from the centre (see `Normaliser.fit`)
NEAR_CONSTANT = 1e-4  # a dimension whose whole range is below this, relative to max(1, |mean|), says nothing
NEAR_CONSTANT_SCALE = 1e-2  # what such a dimension is divided by, relative to max(1, |mean|)
FAR = 10.0  # normalised size from which a state is unusual; less than 1 % of training data lies beyond


@dataclass(frozen=True, eq=False)
class Normaliser:
    """An invertible map of each dimension: ``encode(x) = (x - offset) / scale * gain - shift``.

    Where it is `clipped`, to [-1, 1], only what lies in the range comes back; a scale of 0 gives 0, and comes
    back as the offset. `clips_input` clips only what is encoded. Dimensions in `zeroed` become 0, those in
    `unchanged` are left as they are.
    """

    offset: NDArray[np.float64]
    scale: NDArray[np.float64]
    gain: float
    shift: float
    clipped: bool = False
    clips_input: bool = False
    zeroed: NDArray[np.bool_] | None = None
    unchanged: NDArray[np.bool_] | None = None

    @classmethod
    def fit(
        cls, statistics: Statistics, method: Normalisation, unchanged: Sequence[bool] = ()
    ) -> "Normaliser":
        """Return the normaliser of `method`; only GR00T's and OpenVLA's clip, and only the latter's leaves
        the dimensions `unchanged` as they are. Statistics of steps make one for the first steps of a chunk.

        Of vlafit's ("mean_std": z-scores; "quantile": q01 to q99 mapped to [-1, 1]; "min_max": its range)
        the divisor is never so small that a *recorded* value would land further than 50 from the centre: a
        dimension that hardly ever moves otherwise gives q99 - q01 near 0 and normalised values in the
        thousands. A dimension that is constant but for noise is divided by 1e-2 * max(1, |mean|), so that
        an unforeseen value at run time stays small too. All stay invertible. Statistics without a range
        are another program's: a policy was trained with them as they are, so its formula is used as it is,
        without floors.

        Raises CodecError where `method` needs statistics that were not recorded.
        """
        if method == "identity":
            return cls(np.zeros(1), np.ones(1), 1.0, 0.0)
        one, other = (statistics.array(name) for name in NEEDED[method])
        match method:
            case "mean_std":
                return cls(statistics.mean, _floored(statistics, statistics.std, 1.0), 1.0, 0.0)
            case "quantile" | "min_max":
                scale = _floored(statistics, other - one, 2.0)
                return cls(np.where(_constant(statistics), statistics.mean - scale / 2, one), scale, 2.0, 1.0)
            case "lerobot_mean_std":
                return cls(one, other + LEROBOT_EPSILON, 1.0, 0.0)
            case "lerobot_quantile" | "lerobot_min_max":
                return cls(one, np.where(other == one, LEROBOT_EPSILON, other - one), 2.0, 1.0)
            case "groot_quantile" | "groot_min_max":
                return cls(one, other - one, 2.0, 1.0, clipped=True)
            case "nvidia_quantile" | "nvidia_min_max":
                still = np.isclose(other, one)  # Isaac-GR00T, data/utils.py; LeRobot: where they are equal
                return cls(one, other - one, 2.0, 1.0, clipped=True, zeroed=still)
            case "nvidia_mean_std" | "nvidia_mean_std_clipped":
                still, clips = other == 0, method == "nvidia_mean_std_clipped"  # still ones stay as they are
                offset, scale = np.where(still, 0.0, one), np.where(still, 1.0, other)
                return cls(offset, scale, 1.0, 0.0, clips_input=clips)
            case "openvla_quantile" | "openvla_min_max":
                low, high = statistics.min, statistics.max
                zeroed = None if low is None or high is None else low == high
                kept = np.asarray(unchanged, dtype=np.bool_) if any(unchanged) else None
                scale = other - one + OPENVLA_EPSILON
                return cls(one, scale, 2.0, 1.0, clips_input=True, zeroed=zeroed, unchanged=kept)

    def encode(self, values: NDArray) -> NDArray[np.float64]:
        """Normalise [..., d]; with statistics of steps, the first steps of a chunk [k, d]."""
        one = self._first(values)
        if one.clipped:
            scaled = (values - one.offset) / np.where(one.scale == 0, 1.0, one.scale) * one.gain - one.shift
            still = one.scale == 0 if one.zeroed is None else one.zeroed
            return np.where(still, 0.0, scaled.clip(-1.0, 1.0))
        scaled = (values - one.offset) / one.scale * one.gain - one.shift
        if one.clips_input:
            scaled = scaled.clip(-1.0, 1.0)
        if one.zeroed is not None:
            scaled = np.where(one.zeroed, 0.0, scaled)
        return scaled if one.unchanged is None else np.where(one.unchanged, values, scaled)

    def decode(self, values: NDArray) -> NDArray[np.float64]:
        """Undo `encode`."""
        one = self._first(values)
        if one.clipped:
            values = values.clip(-1.0, 1.0)
        decoded = (values.astype(np.float64) + one.shift) / one.gain * one.scale + one.offset
        return decoded if one.unchanged is None else np.where(one.unchanged, values, decoded)

    def unclipped(self, statistics: Statistics) -> "Normaliser":
        """Return how far values lie outside `statistics`, its own, where encoding clips; else itself.

        As those of vlafit's methods, divisors have floors: a gripper that hardly ever opens has quantiles
        that are equal, and says nothing. What is 0 whatever it was stays 0.
        """
        if not (self.clipped or self.clips_input):
            return self
        still = self.scale == 0 if self.zeroed is None else self.zeroed
        size = np.maximum(1.0, np.abs(statistics.mean))
        if statistics.min is None or statistics.max is None:
            still = still | (np.abs(self.scale) <= NEAR_CONSTANT * size)
        scale = np.where(still, 1.0, _floored(statistics, self.scale, self.gain))
        return replace(self, scale=scale, clipped=False, clips_input=False, zeroed=still)

    def _first(self, values: NDArray) -> "Normaliser":
        """Return the normaliser of as many steps as `values` [k, d] has; itself where all steps have one."""
        if self.offset.ndim == 1:
            return self
        steps = slice(len(values))
        zeroed = None if self.zeroed is None else self.zeroed[steps]
        return replace(self, offset=self.offset[steps], scale=self.scale[steps], zeroed=zeroed)


@dataclass(frozen=True, eq=False)
class MixedNormaliser:
    """Normalises some dimensions [n] in one way, and others in another."""

    parts: tuple[tuple[NDArray[np.int64], Normaliser], ...]

    @classmethod
    def fit(cls, statistics: Statistics, methods: Sequence[Normalisation]) -> "MixedNormaliser":
        """Return the normaliser that has a method for each dimension. Raises as `Normaliser.fit` does."""
        parts = []
        for method in dict.fromkeys(methods):
            chosen = np.flatnonzero([one == method for one in methods])
            parts.append((chosen, Normaliser.fit(statistics.only(chosen), method)))
        return cls(tuple(parts))

    def encode(self, values: NDArray) -> NDArray[np.float64]:
        """Normalise as `Normaliser.encode` does."""
        encoded = np.empty(values.shape)
        for chosen, one in self.parts:
            encoded[..., chosen] = one.encode(values[..., chosen])
        return encoded

    def decode(self, values: NDArray) -> NDArray[np.float64]:
        """Undo `encode`."""
        decoded = np.empty(values.shape)
        for chosen, one in self.parts:
            decoded[..., chosen] = one.decode(values[..., chosen])
        return decoded

    def unclipped(self, statistics: Statistics) -> "MixedNormaliser":
        """Return how far values lie outside `statistics`, as `Normaliser.unclipped` does."""
        return MixedNormaliser(
            tuple((chosen, one.unclipped(statistics.only(chosen))) for chosen, one in self.parts)
        )


def _constant(statistics: Statistics) -> NDArray[np.bool_]:
    """Return which dimensions are constant but for noise; none where the range is not known."""
    if statistics.min is None or statistics.max is None:
        return np.zeros(statistics.dimensions, dtype=np.bool_)
    size = np.maximum(1.0, np.abs(statistics.mean))
    return statistics.max - statistics.min <= NEAR_CONSTANT * size


def _floored(statistics: Statistics, width: NDArray[np.float64], gain: float) -> NDArray[np.float64]:
    """Return what to divide by: `width`, unless the range asks for more; `gain` is 2 for a whole range."""
    if statistics.min is None or statistics.max is None:
        return width + EPSILON
    scale = np.maximum(width, gain * (statistics.max - statistics.min) / FURTHEST) + EPSILON
    wide = gain * NEAR_CONSTANT_SCALE * np.maximum(1.0, np.abs(statistics.mean))
    return np.where(_constant(statistics), wide, scale)
