"""Recorded episodes, whatever their layout: what a store must offer, and how one is opened from its card."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import Card
from vlafit.errors import DataError, did_you_mean
from vlafit.types import Embodiment


@dataclass(frozen=True)
class EpisodeInfo:
    """One episode. `id` is unique in its store and stays the same wherever the files are put."""

    id: str
    task: str
    instruction: str
    length: int
    seed: int | None = None
    """The simulation seed that the episode started from, where the file tells."""


class EpisodeStore(ABC):
    """Random access to the episodes of one dataset.

    Opening checks the files against the card. A store can be pickled; a worker process reopens files when it
    first reads an image.
    """

    card: Card
    embodiment: Embodiment
    episodes: tuple[EpisodeInfo, ...]
    _indices: dict[str, int]

    def index(self, episode_id: str) -> int:
        """Return the position of an episode by its id. Raises DataError where there is none."""
        try:
            return self._indices[episode_id]
        except KeyError:
            near = did_you_mean(episode_id, self._indices) if len(self._indices) < 20 else ""
            raise DataError(f"dataset {self.card.name!r} has no episode {episode_id!r}{near}") from None

    @abstractmethod
    def state(self, episode: int) -> NDArray[np.float32]:
        """Return the states [T, s] of the episode at a position; not to be written to."""

    @abstractmethod
    def actions(self, episode: int) -> NDArray[np.float32]:
        """Return the actions [T, a] of the episode at a position; not to be written to."""

    @abstractmethod
    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        """Return one frame [h, w, 3], upright; not to be written to."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; they reopen when needed."""


def open_dataset(card: Card) -> EpisodeStore:
    """Open the dataset of a card. Raises DataError saying where the files are not what the card says."""
    match card.layout:
        case "libero" | "robomimic":
            from vlafit.datasets.layouts.hdf5 import Hdf5Store

            return Hdf5Store(card)
