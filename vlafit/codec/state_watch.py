"""Notice states at run time that the statistics do not describe, as of a robot in other units.

Training refuses such data (`vlafit.datasets.value_faults`). A robot in motion is not stopped: whoever acts
warns once for each dimension.
"""

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.codec import Codec
from vlafit.codec.normaliser import FAR, NEAR_CONSTANT
from vlafit.codec.statistics import Statistics
from vlafit.codec.unit_scales import SCALES

CLEAR = 0.25  # of the range's width: how far outside of it a value lies clearly
# What stands for the range where it was not recorded: 98 % of the data lie between the quantiles
WIDER = 0.1  # of the quantiles' distance, on either side
DEVIATIONS = 3.0


class StateWatch:
    """Says once for each dimension that a state lies far outside the statistics of a codec.

    Values that became larger are normalised to something large. Those that became smaller are all near zero,
    which may be little outside; they are told by one factor between units that brings them into the range.
    """

    def __init__(self, codec: Codec) -> None:
        self._columns, self._statistics = codec.columns, codec.statistics["state"]
        self._normaliser = codec.unclipped("state")
        self._unit = codec.embodiment.state.unit
        self._low, self._high = _range(self._statistics)
        size = np.maximum(1.0, np.abs(self._statistics.mean))
        self._moves = self._high - self._low > NEAR_CONSTANT * size
        self._seen = np.zeros(self._statistics.dimensions, dtype=np.bool_)

    def sentences(self, state: NDArray) -> list[str]:
        """Return a sentence for each dimension of the state [s] that is far outside for the first time.

        A rare value that was recorded, as of a gripper that hardly ever opens, is inside.
        """
        learned = self._columns.states(state.astype(np.float64))
        size = np.abs(self._normaliser.encode(learned))
        outside = size > FAR
        if self._statistics.min is not None and self._statistics.max is not None:
            outside &= ~self._inside(learned)
        outside |= self._scaled(learned)
        new = outside & ~self._seen
        if not new.any():
            return []
        self._seen |= new
        guess = self._guess(learned, outside)
        return [self._sentence(int(index), learned, size, guess) for index in np.flatnonzero(new)]

    def _inside(self, values: NDArray) -> NDArray[np.bool_]:
        return (values >= self._low) & (values <= self._high)

    def _scaled(self, values: NDArray) -> NDArray[np.bool_]:
        """Return the dimensions [d] clearly outside, where one factor between units brings them all inside.

        One dimension alone may be so by chance; then the factor must bring all others inside, too.
        """
        beyond = np.maximum(self._low - values, values - self._high)
        clear = self._moves & (beyond > CLEAR * (self._high - self._low))
        for scale in SCALES if clear.any() else ():
            inside = self._inside(values * scale) | ~self._moves
            if inside.all() or (clear.sum() > 1 and inside[clear].all()):
                return clear
        return np.zeros_like(clear)

    def _guess(self, values: NDArray, outside: NDArray[np.bool_]) -> str:
        """Return which units may be mixed up: their factor brings all that is outside into the range."""
        fitting = [text for scale, text in SCALES.items() if self._inside(values * scale)[outside].all()]
        return f"in {'; or '.join(fitting)}" if fitting else "in the units of the training data"

    def _sentence(self, index: int, state: NDArray, size: NDArray, guess: str) -> str:
        mean, std = self._statistics.mean[index], self._statistics.std[index]
        labels = self._columns.state_labels
        name = labels[index] if labels else str(index)
        unit = f" {self._unit}" if self._unit else ""
        low, high = self._statistics.min, self._statistics.max
        trained = "" if low is None or high is None else f"{low[index]:.4g} to {high[index]:.4g}{unit}, "
        return (
            f"state.{name} = {state[index]:.4g} is far outside the statistics of the checkpoint ({trained}"
            f"mean {mean:.3g}, std {std:.3g}; normalised {size[index]:.3g}): is it {guess}?"
        )


def _range(statistics: Statistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and the largest value of each dimension, or what stands for them."""
    if statistics.min is not None and statistics.max is not None:
        return statistics.min, statistics.max
    if statistics.q01 is not None and statistics.q99 is not None:
        wider = WIDER * (statistics.q99 - statistics.q01)
        return statistics.q01 - wider, statistics.q99 + wider
    return statistics.mean - DEVIATIONS * statistics.std, statistics.mean + DEVIATIONS * statistics.std
