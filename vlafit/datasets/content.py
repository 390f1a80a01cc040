"""Recognise an episode by its states and by its actions, whatever its file, name, instruction or layout."""

import hashlib
from collections.abc import Collection
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.store import EpisodeStore

_KEPT: WeakKeyDictionary[EpisodeStore, dict[int, tuple[str, ...]]] = WeakKeyDictionary()
DIGITS = 16  # of a SHA-256: two of a hundred thousand episodes are alike by chance once in 4 billion


def content_of(store: EpisodeStore, number: int) -> tuple[str, ...]:
    """Return the digest of an episode's states, and that of its actions.

    A column that never changes tells nothing and is left out; an episode where neither changes has one digest
    of both. The order of the dimensions does not count. Either digest recognises the episode where a card
    scales only the other column. Kept as long as the store.
    """
    kept = _KEPT.setdefault(store, {})
    if number not in kept:
        kept[number] = _content(store, number)
    return kept[number]


def _content(store: EpisodeStore, number: int) -> tuple[str, ...]:
    columns = (store.state(number), store.actions(number))
    telling = [_digest(rows) for rows in columns if len(rows) and np.ptp(rows, axis=0).any()]
    return tuple(telling) or (_short(b"".join(_digest(rows).encode() for rows in columns)),)


def recognise(store: EpisodeStore, known: Collection[str]) -> tuple[str, ...]:
    """Return the ids of the episodes of `store` of which a digest is `known`, in the store's order.

    A digest that episodes share whose other column differs (a clock as the state, say) recognises none.
    """
    contents = [content_of(store, number) for number in range(len(store.episodes))]
    episodes_with: dict[str, set[tuple[str, ...]]] = {}
    for content in contents:
        for digest in content:
            episodes_with.setdefault(digest, set()).add(content)
    return tuple(
        info.id
        for info, content in zip(store.episodes, contents, strict=True)
        if any(digest in known and len(episodes_with[digest]) == 1 for digest in content)
    )


def _digest(rows: NDArray) -> str:
    """Return the digest of a column [t, d], whatever the order of its dimensions."""
    values = np.ascontiguousarray(rows.T, dtype=np.float32) + np.float32(0)  # -0.0 becomes 0.0
    return _short(b"".join(sorted(hashlib.sha256(one.data).digest() for one in values)))


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
