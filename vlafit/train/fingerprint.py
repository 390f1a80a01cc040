"""A hash that tells one dataset, and one split of it, from another."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vlafit.datasets import EpisodeStore


def episodes_hash(store: EpisodeStore, training: Sequence[str], validation: Sequence[str]) -> str:
    """Return a hash of the episodes of `store` that train and validate: states, actions, instructions.

    It leaves out the pictures, which would have to be read whole.
    """
    found = hashlib.sha256()
    for split in (training, validation):
        found.update(f"{len(split)} episodes".encode())
        for identity in split:
            number = store.index(identity)
            info, state, actions = store.episodes[number], store.state(number), store.actions(number)
            told = [info.id, info.task, info.instruction, info.length, state.shape, actions.shape]
            found.update(json.dumps(told).encode())
            found.update(np.ascontiguousarray(state).data)
            found.update(np.ascontiguousarray(actions).data)
    return found.hexdigest()
