"""Training samples: an observation at every step, with the chunk of actions that followed it."""

from collections.abc import Sequence

import numpy as np

from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError
from vlafit.types import Observation, Sample


class ChunkDataset:
    """Every step of the chosen episodes as a `Sample`; a torch map-style dataset without torch.

    Past an episode's end the last action is repeated, and `is_real` is False. Steps are numbered store by
    store, episode by episode in the order given, so a position always means the same sample.
    """

    def __init__(self, stores: Sequence[EpisodeStore], chunk: int, episodes: Sequence[Sequence[str]]) -> None:
        """`episodes` gives, for each store, the ids to use. Raises DataError where there are none."""
        if chunk < 1:
            raise DataError(f"a chunk needs at least one step, got {chunk}")
        self.stores = tuple(stores)
        self.chunk = chunk
        self._where: list[tuple[int, int]] = []  # (store, episode) in order
        for number, (store, ids) in enumerate(zip(stores, episodes, strict=True)):
            self._where.extend((number, store.index(i)) for i in ids)
        lengths = [self.stores[s].episodes[e].length for s, e in self._where]
        if not lengths:
            raise DataError("no episodes are chosen, so there is nothing to learn from")
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Sample:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        place = int(np.searchsorted(self._ends, position, side="right"))
        number, episode = self._where[place]
        store = self.stores[number]
        info = store.episodes[episode]
        step = position - (int(self._ends[place]) - info.length)
        rows = np.arange(step, step + self.chunk)
        observation = Observation(
            images={c.name: store.image(episode, step, c.name) for c in store.embodiment.cameras},
            state=store.state(episode)[step],
            instruction=info.instruction,
        )
        actions = store.actions(episode)[np.minimum(rows, info.length - 1)]
        return Sample(observation, actions, rows < info.length, (store.card.name, info.id, step))
