"""Training samples: an observation at every step, with the chunk of actions that followed it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError
from vlafit.types import Sample


class ChunkDataset:
    """Every step of the chosen episodes as a `Sample`; a torch map-style dataset without torch.

    Steps are numbered store by store, episode by episode in the order of the arguments, so a position always
    means the same sample. `EpisodeStore.sample` says how chunks and histories are padded.
    """

    def __init__(
        self, stores: Sequence[EpisodeStore], chunk: int, episodes: Sequence[Sequence[str]], history: int = 1
    ) -> None:
        """`episodes` holds, for each store, the ids to use. Raises DataError if there are none."""
        if chunk < 1:
            raise DataError(f"a chunk needs at least one step, got {chunk}")
        if history < 1:
            raise DataError(f"a history needs at least one step (the present one), got {history}")
        self.stores = tuple(stores)
        self.chunk = chunk
        self.history = history
        self._where: list[tuple[int, int]] = []  # (store, episode) in order
        for number, (store, ids) in enumerate(zip(stores, episodes, strict=True)):
            self._where.extend((number, store.index(i)) for i in ids)
        lengths = [self.stores[s].episodes[e].length for s, e in self._where]
        if not lengths:
            raise DataError("no episodes are chosen, so there is nothing to learn from")
        self._ends = np.cumsum(lengths)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of steps of each store."""
        sizes = [0] * len(self.stores)
        for number, episode in self._where:
            sizes[number] += self.stores[number].episodes[episode].length
        return tuple(sizes)

    def store_of(self, position: int) -> int:
        """Return the number of the store that a position belongs to."""
        return self._where[int(np.searchsorted(self._ends, position, side="right"))][0]

    def place(self, position: int) -> tuple[int, int, int]:
        """Return (number of the store, position of the episode in it, step) of a sample."""
        at = int(np.searchsorted(self._ends, position, side="right"))
        number, episode = self._where[at]
        length = self.stores[number].episodes[episode].length
        return number, episode, position - (int(self._ends[at]) - length)

    def episodes(self) -> Sequence[tuple[int, int]]:
        """Return (number of the store, position in it) of every episode."""
        return self._where

    def files(self) -> NDArray[np.int64]:
        """Return the number of the file that each sample is in: of its first video, or of its rows.

        An episode whose layout tells none is a file of its own.
        """
        numbers: dict[object, int] = {}
        counts, lengths = [], []
        for number, episode in self._where:
            store = self.stores[number]
            own = store.files_of(episode)
            key = (number, own[0][0] if own else episode)
            counts.append(numbers.setdefault(key, len(numbers)))
            lengths.append(store.episodes[episode].length)
        return np.repeat(np.asarray(counts, np.int64), lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Sample:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number, episode, step = self.place(position)
        return self.stores[number].sample(episode, step, self.chunk, self.history)
