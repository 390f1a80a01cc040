"""How far a robot moves from step to step, in units of its range, without the noise of its sensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOISE = 8.0  # times the median second difference: motion beyond the noise of some hundred steps
FAST = 0.95  # of the steps of a dimension: what is faster (a gripper that closes in one step) counts as this
LEAST = 1e-3  # of the range: a motion below this shows in no picture


@dataclass(frozen=True)
class Scale:
    """The range of each dimension of the state in most episodes, and how large its noise may be."""

    range: NDArray[np.float64]  # [d]
    noise: NDArray[np.float64]  # [d], the median second difference
    fast: NDArray[np.float64]  # [d], the step that counts most in `steps`

    @property
    def moving(self) -> NDArray[np.bool_]:
        """Which dimensions move by more than their noise in some episodes [d]."""
        return self.range > np.maximum(NOISE * self.noise, 1e-9)

    def steps(self, state: NDArray) -> NDArray[np.float64]:
        """Return by how much the state changes at each step [T - 1], all dimensions together."""
        return self.each(state).sum(axis=1)

    def each(self, state: NDArray) -> NDArray[np.float64]:
        """Return by how much each moving dimension changes at each step [T - 1, moving]."""
        size = np.minimum(np.abs(np.diff(finite(state), axis=0)), self.fast)[:, self.moving]
        return size / self.range[self.moving]

    def within(self, state: NDArray) -> NDArray[np.float64]:
        """Return the range over which each moving dimension moves in these steps, without noise [moving]."""
        size = np.ptp(finite(state), axis=0)[self.moving]
        bound = np.maximum(NOISE * self.noise, LEAST * self.range)[self.moving]
        return np.where(size > bound, size, 0.0) / self.range[self.moving]


def scale_of(states: Sequence[NDArray]) -> Scale:
    """Return the scale of all episodes' states [T, d]."""
    widths, noises, steps = [], [], []
    for state in states:
        rows = finite(state)
        widths.append(np.ptp(rows, axis=0))
        steps.append(np.abs(np.diff(rows, axis=0)))
        if len(rows) > 2:
            noises.append(np.median(np.abs(np.diff(rows, 2, axis=0)), axis=0))
    width = np.quantile(widths, 0.9, axis=0, method="lower")
    joined = np.concatenate(steps)
    fast = np.quantile(joined, FAST, axis=0) if len(joined) else np.zeros_like(width)
    if not fast.any():  # hardly anything moves
        fast = np.full_like(width, np.inf)
    return Scale(width, np.median(noises, axis=0) if noises else np.zeros_like(width), fast)


def finite(state: NDArray) -> NDArray[np.float64]:
    """Return values with 0 for those that are not finite, which another check names."""
    return np.nan_to_num(state.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
