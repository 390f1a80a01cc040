"""Notice states at run time that the statistics do not describe, as of a robot in other units.

Training refuses such data (`vlafit.datasets.value_faults`). A robot in motion is not stopped: whoever acts
warns once for each dimension.
"""

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.codec import Codec
from vlafit.codec.normaliser import FAR


class StateWatch:
    """Says once for each dimension that a state lies far outside the statistics of a codec."""

    def __init__(self, codec: Codec) -> None:
        self._columns, self._statistics = codec.columns, codec.statistics["state"]
        self._normaliser = codec.unclipped("state")
        self._seen = np.zeros(self._statistics.dimensions, dtype=np.bool_)

    def sentences(self, state: NDArray) -> list[str]:
        """Return a sentence for each dimension of the state [s] that is far outside for the first time.

        A rare value that was recorded, as of a gripper that hardly ever opens, is inside.
        """
        learned = self._columns.states(state.astype(np.float64))
        size = np.abs(self._normaliser.encode(learned))
        outside = (size > FAR) & ~self._seen
        if not outside.any():
            return []
        least, most = self._statistics.min, self._statistics.max
        if least is not None and most is not None:
            outside &= (learned < least) | (learned > most)
        self._seen |= outside
        return [self._sentence(int(index), learned, size) for index in np.flatnonzero(outside)]

    def _sentence(self, index: int, state: NDArray, size: NDArray) -> str:
        mean, std = self._statistics.mean[index], self._statistics.std[index]
        labels = self._columns.state_labels
        name = labels[index] if labels else str(index)
        return (
            f"state.{name} = {state[index]:.4g} is far outside the statistics of the checkpoint (mean "
            f"{mean:.3g}, std {std:.3g}; normalised {size[index]:.3g}): is it in the units of the "
            "training data?"
        )
