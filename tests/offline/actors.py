"""Actors on the recorded dots whose offline numbers are known beforehand. None has weights."""

from collections.abc import Callable, Sequence

import numpy as np

from vlafit.datasets import EpisodeStore
from vlafit.types import ActionChunk, EpisodeKey, Observation

CHUNK = 4


class Recalling:
    """Answers with what was recorded, plus `error` in every dimension."""

    def __init__(self, store: EpisodeStore, error: float = 0.0) -> None:
        self.store, self.error = store, error
        self.asked: list[EpisodeKey] = []

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.asked += keys
        return [self._act(seen, key) for seen, key in zip(observations, keys, strict=True)]

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        actions = self.store.actions(self.store.index(key.task.partition("/")[2]))
        rows = np.minimum(np.arange(key.replan, key.replan + CHUNK), len(actions) - 1)
        return ActionChunk(actions[rows] + np.float32(self.error))


class Failing(Recalling):
    """Writes tokens that are a chunk where `is_chunk` says so; else the mean chunk of all is executed."""

    def __init__(
        self, store: EpisodeStore, is_chunk: Callable[[EpisodeKey], bool], error: float = 0.0
    ) -> None:
        super().__init__(store, error)
        self.is_chunk = is_chunk

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        valid = self.is_chunk(key)
        actions = super()._act(seen, key).actions if valid else np.full((CHUNK, 2), 0.25, np.float32)
        return ActionChunk(actions, valid)


class Still(Recalling):
    """Never moves."""

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        return ActionChunk(np.zeros((CHUNK, 2), np.float32))


class Sampling(Recalling):
    """Draws from a normal distribution around what the sentence names, blind to picture and state."""

    def __init__(self, store: EpisodeStore, deviation: float) -> None:
        super().__init__(store)
        self.deviation = deviation

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        episode = list(key.task.encode())
        rng = np.random.default_rng([key.seed, key.replan, *episode])
        side = 1.0 if "right" in seen.instruction else -1.0 if "left" in seen.instruction else 0.0
        return ActionChunk(rng.normal([side, 0.0], self.deviation, (CHUNK, 2)).astype(np.float32))
