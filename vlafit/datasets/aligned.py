"""Episodes whose actions are taken from other rows than their observations (a card's rows.action_shift)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.stamps import Stamp
from vlafit.datasets.store import EpisodeStore, RecordedStatistics
from vlafit.errors import DataError


class Aligned(EpisodeStore):
    """Episodes of another store: the action of step t is the other's of row t + `shift`."""

    def __init__(self, store: EpisodeStore, shift: int) -> None:
        """Raises DataError naming an episode that is too short."""
        self.card, self._store, self._shift = store.card, store, shift
        self.left_out, self.splits = store.left_out, dict(store.splits)
        short = [info for info in store.episodes if info.length <= shift or info.length < -shift]
        if short:
            left = "step" if shift > 0 else "action but the first"
            raise DataError(
                f"dataset {self.card.name!r}: rows.action_shift = {shift} leaves no {left} of episode "
                f"{short[0].id!r}, which has {short[0].length} rows"
            )
        self.episodes = tuple(replace(info, length=info.length - max(0, shift)) for info in store.episodes)

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._store.state(self.require_episode(episode))[: self.episodes[episode].length]

    def actions(self, episode: int) -> NDArray[np.float32]:
        rows = np.maximum(np.arange(self.episodes[self.require_episode(episode)].length) + self._shift, 0)
        actions = self._store.actions(episode)[rows]
        actions.flags.writeable = False
        return actions

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        self.require_step(episode, step)
        return self._store.image(episode, step, camera)

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        return self._store.images(episode, self.require_steps(episode, steps), camera)

    def frames_at(self, episode: int, step: int) -> dict[str, NDArray[np.uint8]]:
        return self._store.frames_at(episode, self.require_step(episode, step))

    def files(self) -> tuple[Path, ...]:
        return self._store.files()

    def stamps(self) -> list[tuple[Path, Stamp]]:
        return self._store.stamps()

    def film_beside(self, episode: int, camera: str) -> Path | None:
        return self._store.film_beside(episode, camera)

    def success_key(self) -> str:
        return self._store.success_key()

    def recorded_statistics(self) -> RecordedStatistics:
        stated = self._store.recorded_statistics()
        if not stated.columns:
            return stated
        return RecordedStatistics(reason="rows.action_shift makes other rows than those of its statistics")

    def ahead(self) -> int:
        return self._store.ahead()

    def files_of(self, episode: int) -> list[tuple[Path, int]]:
        return self._store.files_of(episode)

    def copy_ahead(self, path: Path) -> None:
        self._store.copy_ahead(path)

    def close(self) -> None:
        self._store.close()
