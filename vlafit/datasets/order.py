"""The order of samples: an endless shuffled stream that can be entered at any step."""

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError


class SampleOrder:
    """Every sample once an epoch, in an order that is a pure function of (seed, epoch).

    The stream runs through epoch ends, so batches are always full; a run that resumes at step k asks for
    batch k, and nothing needs to be stored.
    """

    def __init__(self, size: int, seed: int) -> None:
        """`size` samples. Raises DataError where there are none."""
        if size < 1:
            raise DataError("there are no samples to order")
        self.size = size
        self.seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def sample(self, k: int) -> tuple[int, int]:
        """Return (epoch, index) of the k-th sample of the stream."""
        epoch, position = divmod(k, self.size)
        return epoch, int(self._permutation(epoch)[position])

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of each sample of the batch at `step`, counted from 0."""
        return [self.sample(k) for k in range(step * batch_size, (step + 1) * batch_size)]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            while len(self._permutations) >= 2:  # a batch rarely spans more than two epochs
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._permutations[epoch]
