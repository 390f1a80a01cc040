"""Refuse the same demonstration in training and in validation: under another name, or in another file."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

Chosen = tuple[str, EpisodeStore, Sequence[str]]  # what it is called, the store, ids of its episodes


def require_apart(training: Iterable[Chosen], validation: Iterable[Chosen]) -> None:
    """Raise DataError naming both if an episode of `validation` is one of `training`.

    Episodes are the same if their states, actions, first and middle frames are.
    """
    seen: dict[str, list[tuple[str, EpisodeStore, int]]] = {}
    for where, store, ids in training:
        for identity in ids:
            number = store.index(identity)
            seen.setdefault(_columns(store, number), []).append((where, store, number))
    for where, store, ids in validation:
        for identity in ids:
            number = store.index(identity)
            for other_where, other, other_number in seen.get(_columns(store, number), []):
                if _frames(store, number) == _frames(other, other_number):
                    raise DataError(
                        f"episode {identity!r} of {where} is episode {other.episodes[other_number].id!r} of "
                        f"{other_where}: it would validate what was trained on. Leave one of the two out "
                        "(episodes.skip in its card), or choose masks that share no episode"
                    )


def _columns(store: EpisodeStore, number: int) -> str:
    digest = hashlib.sha256()
    for rows in (store.state(number), store.actions(number)):
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _frames(store: EpisodeStore, number: int) -> str:
    """Hash two frames of a camera; only read where columns are equal."""
    digest = hashlib.sha256()
    camera = store.embodiment.cameras[0].name
    for step in (0, store.episodes[number].length // 2):
        digest.update(np.ascontiguousarray(store.image(number, step, camera)).data)
    return digest.hexdigest()
