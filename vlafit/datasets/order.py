"""The order of samples: an endless shuffled stream that can be entered at any step."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError

BLOCK = 10_000  # positions of a mixture's stream in which every dataset has its exact share
STREAM = 0x4D4958  # "MIX": keeps these draws apart from others that use the same seed


class SampleOrder:
    """Every sample once an epoch, in an order that is a pure function of (seed, epoch).

    The stream runs through epoch ends, so batches are always full; a run that resumes at step k asks for
    batch k, and nothing needs to be stored.
    """

    def __init__(
        self, size: int, seed: int, *key: int, files: NDArray[np.int64] | None = None, mixed: int = 0
    ) -> None:
        """`size` samples; another `key` gives another order. Raises DataError where there are none.

        With `files`, the number of each sample's file, the samples of `mixed` files at a time are shuffled
        together, and then those of the next; which files come together is drawn for each epoch.
        """
        if size < 1:
            raise DataError("there are no samples to order")
        self._mixed = mixed
        self._files = np.unique(files, return_inverse=True)[1] if files is not None and mixed else None
        self.size = size
        self.seed = seed
        self._key = key
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
            rng = np.random.default_rng([self.seed, epoch, *self._key])
            self._permutations[epoch] = self._drawn(rng)
        return self._permutations[epoch]

    def _drawn(self, rng: np.random.Generator) -> NDArray[np.int64]:
        order = rng.permutation(self.size)
        if self._files is None:
            return order
        ranks = rng.permutation(int(self._files.max()) + 1) // self._mixed  # of each file: its group
        return order[np.argsort(ranks[self._files[order]], kind="stable")]


class MixtureOrder:
    """The samples of several datasets in given shares, in an order that is a pure function of the seed.

    Each dataset has a stream of its own, with its own epochs, so a small one with a large weight repeats
    sooner. Which dataset a position takes is drawn in blocks of `BLOCK` positions: there the shares are exact
    (to 1 in `BLOCK`), and evenly spread, so that every batch has about its share of each.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        files: NDArray[np.int64] | None = None,
        mixed: int = 0,
    ) -> None:
        """`sizes` are the samples of the datasets, numbered one dataset after the other.

        `files` and `mixed`: as for SampleOrder, in the stream of each dataset.
        Raises DataError for an empty dataset, or a weight that is not positive or too small to be drawn.
        """
        self.seed = seed
        self.counts = shares(weights)
        self._offsets = [0, *accumulate(sizes)]
        parts = [
            None if files is None else files[at : at + n]
            for at, n in zip(self._offsets[:-1], sizes, strict=True)
        ]
        self._orders = [
            SampleOrder(size, seed, STREAM, number, files=part, mixed=mixed)
            for number, (size, part) in enumerate(zip(sizes, parts, strict=True))
        ]
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def sample(self, k: int) -> tuple[int, int]:
        """Return (epoch of its dataset, index) of the k-th sample of the stream."""
        block, position = divmod(k, BLOCK)
        datasets, ranks = self._block(block)
        number = int(datasets[position])
        epoch, index = self._orders[number].sample(block * self.counts[number] + int(ranks[position]))
        return epoch, self._offsets[number] + index

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of each sample of the batch at `step`, counted from 0."""
        return [self.sample(k) for k in range(step * batch_size, (step + 1) * batch_size)]

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset of each position of a block, and how many before it in the block are of it."""
        if block not in self._blocks:
            while len(self._blocks) >= 2:
                del self._blocks[next(iter(self._blocks))]
            rng = np.random.default_rng([self.seed, block, STREAM])
            times = [(np.arange(n) + rng.random(n)) / n for n in self.counts]  # one in each n-th of the block
            owners = np.repeat(np.arange(len(self.counts)), self.counts)
            datasets = owners[np.argsort(np.concatenate(times), kind="stable")]
            ranks = np.empty(BLOCK, np.int64)
            for number, n in enumerate(self.counts):
                ranks[datasets == number] = np.arange(n)
            self._blocks[block] = (datasets, ranks)
        return self._blocks[block]


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the positions of a block that each weight gets: `BLOCK` in all, by largest remainder.

    Raises DataError for a weight that is not positive, or gets none.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights must be above 0 and finite, are {list(weights)}")
    exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]
    counts[rest] += 1
    if not counts.all():
        raise DataError(
            f"weight {weights[int(np.argmin(counts))]:g} is below 1 in {BLOCK} of the sum {sum(weights):g}; "
            "enlarge it, or leave that dataset out"
        )
    return tuple(map(int, counts))
