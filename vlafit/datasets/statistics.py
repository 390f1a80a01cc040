"""The arrays that normalisation is fitted on: columns alone, never a frame."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError


def arrays_for_statistics(
    store: EpisodeStore, episode_ids: Sequence[str], chunk: int, relative: Sequence[bool] = ()
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (states [N, s], actions [M, a]) of the given (training) episodes, without touching images.

    With no chunk-relative dimension M = N. With one, there is a row for each real step of each chunk, since
    the difference depends on the chunk's start; steps past an episode's end never count.
    """
    if not episode_ids:
        raise DataError(f"dataset {store.card.name!r}: no episodes are chosen to take statistics from")
    mask = np.asarray(relative, dtype=np.bool_)
    states, windows = [], []
    for episode in map(store.index, episode_ids):
        state, actions = store.state(episode), store.actions(episode)
        states.append(state)
        if not mask.any():
            windows.append(actions)
            continue
        if len(mask) != actions.shape[1]:
            raise DataError(f"relative has {len(mask)} entries for {actions.shape[1]} action dimensions")
        dimensions = np.flatnonzero(mask)
        if dimensions[-1] >= state.shape[1]:
            raise DataError(
                f"relative: action dimension {dimensions[-1]} has no state dimension to be relative to"
            )
        for ahead in range(min(chunk, len(actions))):
            window = actions[ahead:].copy()
            window[:, dimensions] -= state[: len(window), dimensions]
            windows.append(window)
    return np.concatenate(states), np.concatenate(windows)
