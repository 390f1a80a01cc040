"""Refuse the same demonstration in training and in validation: under another name, or in another file."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vlafit.datasets.content import content_of, recognise
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

Chosen = tuple[str, EpisodeStore, Sequence[str]]  # what it is called, the store, ids of its episodes


def require_apart(training: Iterable[Chosen], validation: Iterable[Chosen]) -> None:
    """Raise DataError naming both if an episode of `validation` is one of `training`.

    Episodes are the same if their states or their actions are, and their first and middle frames.
    """
    seen: dict[str, list[tuple[str, EpisodeStore, int]]] = {}
    for where, store, ids in training:
        for identity in ids:
            number = store.index(identity)
            for digest in content_of(store, number):
                seen.setdefault(digest, []).append((where, store, number))
    for where, store, ids in validation:
        for identity in ids:
            number = store.index(identity)
            alike = [other for digest in content_of(store, number) for other in seen.get(digest, [])]
            for other_where, other, other_number in alike:
                if _frames(store, number) == _frames(other, other_number):
                    raise DataError(
                        f"episode {identity!r} of {where} is episode {other.episodes[other_number].id!r} of "
                        f"{other_where}: it would validate what was trained on. Leave one of the two out "
                        "(episodes.skip in its card), or choose masks that share no episode"
                    )


def learned_before(
    stores: Sequence[EpisodeStore], held_out: Sequence[Sequence[str]], known: Sequence[str], checkpoint: str
) -> Iterator[str]:
    """Yield a sentence for each dataset of whose `held_out` episodes a `checkpoint` learned from some.

    `known` are the digests of all that it learned from.
    """
    for store, ids in zip(stores, held_out, strict=True):
        recognised = set(recognise(store, frozenset(known))) if known and ids else set()
        seen = [identity for identity in ids if identity in recognised]
        if seen:
            yield (
                f"card {store.card.name!r}: checkpoint {checkpoint!r} has learned from {len(seen)} of the "
                f"{len(ids)} held-out episodes ({seen[0]!r}, say), so their loss says little about new ones; "
                "the train.seed and data.validation of its run hold out the same ones"
            )


def _frames(store: EpisodeStore, number: int) -> str:
    """Hash two frames of a camera; only read where columns are equal."""
    digest = hashlib.sha256()
    camera = store.embodiment.cameras[0].name
    for step in (0, store.episodes[number].length // 2):
        digest.update(np.ascontiguousarray(store.image(number, step, camera)).data)
    return digest.hexdigest()
