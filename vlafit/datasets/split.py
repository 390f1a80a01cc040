"""Which episodes train and which validate: whole episodes, the same share of every task."""

import hashlib
import json
import zlib
from collections.abc import Sequence

import numpy as np

from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError


def split_episodes(
    store: EpisodeStore, share: float, seed: int, per_task: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of (training, validation) episodes, in the store's order.

    Of each task's episodes, `share` validates (at least one, where the share is above 0 and the task has
    two); the draw depends on the seed and the task alone. `per_task` caps the training episodes of each task
    (0: all) and leaves the validation episodes as they are. Raises DataError where a task would keep none.
    """
    if not 0 <= share < 1:
        raise DataError(f"the validation share must be from 0 to below 1, is {share}")
    if per_task < 0:
        raise DataError(f"episodes per task must be 0 (all) or more, is {per_task}")
    tasks: dict[str, list[str]] = {}
    for info in store.episodes:
        tasks.setdefault(info.task, []).append(info.id)
    train: set[str] = set()
    held_out: set[str] = set()
    for task, ids in tasks.items():
        draw = np.random.default_rng([seed, zlib.crc32(task.encode())])
        shuffled = [ids[i] for i in draw.permutation(len(ids))]
        count = min(max(1, round(share * len(ids))), len(ids) - 1) if share > 0 else 0
        held_out.update(shuffled[:count])
        train.update(shuffled[count:][: per_task or None])
    order = [info.id for info in store.episodes]
    return tuple(i for i in order if i in train), tuple(i for i in order if i in held_out)


def episodes_hash(store: EpisodeStore, training: Sequence[str], validation: Sequence[str]) -> str:
    """Return a hash of the split and of the states, actions and instructions of its episodes.

    Images are left out, because they would have to be read completely.
    """
    digest = hashlib.sha256()
    for split in (training, validation):
        digest.update(f"{len(split)} episodes".encode())
        for identity in split:
            number = store.index(identity)
            info, state, actions = store.episodes[number], store.state(number), store.actions(number)
            header = [info.id, info.task, info.instruction, info.length, state.shape, actions.shape]
            digest.update(json.dumps(header).encode())
            digest.update(np.ascontiguousarray(state).data)
            digest.update(np.ascontiguousarray(actions).data)
    return digest.hexdigest()
