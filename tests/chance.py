"""Chance as an actor: what every policy and expert must beat."""

import zlib
from collections.abc import Sequence

import numpy as np

from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Observation


class RandomActor:
    """Actions drawn evenly from [low, high], decided by the episode's key; each chunk is [steps, a]."""

    def __init__(
        self, embodiment: Embodiment, *, low: float = -1.0, high: float = 1.0, steps: int = 1
    ) -> None:
        self._shape = (steps, *embodiment.action.shape)
        self._low, self._high = low, high

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one random chunk for each key; the observations do not matter."""
        return [self._draw(key) for _, key in zip(observations, keys, strict=True)]

    def _draw(self, key: EpisodeKey) -> ActionChunk:
        rng = np.random.default_rng([key.seed, zlib.crc32(key.task.encode()), key.replan])
        return ActionChunk(rng.uniform(self._low, self._high, self._shape).astype(np.float32))
