"""Find the same demonstration twice: in training and in validation, or in two datasets of a run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlafit.datasets.content import content_of, recognise
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

Chosen = tuple[str, EpisodeStore, Sequence[str]]  # what it is called, the store, ids of its episodes
BLOCKS = 16  # a side, in which pictures are compared
ALIKE = 4.0  # grey levels by which the mean of a block may differ: what a video's compression changes
FLAT = 8.0  # standard deviation of pictures, below which they show too little for that


@dataclass(frozen=True)
class Repeat:
    """A training episode that is there once more."""

    where: str
    episode: str
    first_where: str
    first: str
    whole: bool
    """Whether states, actions and instruction are the same; else some of them differ."""


def require_apart(training: Iterable[Chosen], validation: Iterable[Chosen]) -> None:
    """Raise DataError naming both if an episode of `validation` is one of `training`.

    Episodes are the same if their states or their actions are, and a camera shows the same in both.
    """
    seen = _Seen()
    for where, store, ids in training:
        for identity in ids:
            seen.add(where, store, store.index(identity))
    for where, store, ids in validation:
        for identity in ids:
            for other_where, other, number in seen.same(store, store.index(identity)):
                raise DataError(
                    f"episode {identity!r} of {where} is episode {other.episodes[number].id!r} of "
                    f"{other_where}: it would validate what was trained on. Leave one of the two out "
                    "(episodes.skip in its card), or choose masks that share no episode"
                )


def repeats(training: Iterable[Chosen]) -> Iterator[Repeat]:
    """Yield the episodes that are there before, in the same dataset or in an earlier one."""
    seen, places = _Seen(), dict[tuple[EpisodeStore, int], int]()
    entries = [(w, store, store.index(i)) for w, store, ids in training for i in ids]
    for place, (where, store, number) in enumerate(entries):
        places[store, number] = place
        seen.add(where, store, number)
    for place, (where, store, number) in enumerate(entries):
        info, content = store.episodes[number], content_of(store, number)
        same = seen.same(store, number)
        before = next((entry for entry in same if places[entry[1], entry[2]] < place), None)
        if before is not None:
            first_where, other, first = before
            one = other.episodes[first]
            whole = content_of(other, first) == content and one.instruction == info.instruction
            yield Repeat(where, info.id, first_where, one.id, whole)


def require_once(training: Iterable[Chosen]) -> None:
    """Raise DataError if a dataset of a robot holds episodes of another one, with the same instructions."""
    found: dict[tuple[str, str], list[Repeat]] = {}
    for repeat in repeats(training):
        if repeat.whole and repeat.where != repeat.first_where:
            found.setdefault((repeat.where, repeat.first_where), []).append(repeat)
    for (where, first_where), those in found.items():
        raise DataError(
            f"{len(those)} training episodes of {where} are those of {first_where} "
            f"({those[0].episode!r} is {those[0].first!r}, say), and would count twice. Leave one of the two "
            "out, or those episodes (episodes.skip in its card); to learn more often from a dataset, give it "
            "a weight (data.weights)"
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


class _Seen:
    """Episodes by their states and by their actions."""

    def __init__(self) -> None:
        self._by: dict[str, dict[tuple[str, ...], list[tuple[str, EpisodeStore, int]]]] = {}

    def add(self, where: str, store: EpisodeStore, number: int) -> None:
        content = content_of(store, number)
        for digest in content:
            self._by.setdefault(digest, {}).setdefault(content, []).append((where, store, number))

    def same(self, store: EpisodeStore, number: int) -> Iterator[tuple[str, EpisodeStore, int]]:
        """Yield the other episodes that are the one at `number`; frames are only read of equal columns.

        A digest that several share whose other columns differ (a clock as the state, say) tells nothing.
        """
        content, alike = content_of(store, number), list[tuple[str, EpisodeStore, int]]()
        for digest in content:
            kinds = self._by.get(digest, {})
            others = [entries for kind, entries in kinds.items() if kind != content]
            alike += [*kinds.get(content, []), *(others[0] if len(others) == 1 else [])]
        alike = [entry for entry in dict.fromkeys(alike) if entry[1:] != (store, number)]
        own = _pictures(store, number) if alike else []
        for where, other, first in alike:
            pictures = _pictures(other, first)
            if any(_alike(a, b) for a in own for b in pictures):
                yield where, other, first


def _pictures(store: EpisodeStore, number: int) -> list[NDArray[np.float32]]:
    """Return the first and the middle frame of each camera, in blocks of grey."""
    steps = [0, store.episodes[number].length // 2]
    return [
        np.stack([_blocks(frame) for frame in store.images(number, steps, camera.name)])
        for camera in store.embodiment.cameras
    ]


def _alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether frames show the same, also where one card turns or mirrors them and the other does not."""
    turns = (other, other[:, ::-1], other[:, :, ::-1], other[:, ::-1, ::-1])
    tolerance = ALIKE if min(one.std(), other.std()) >= FLAT else 0.0
    return any(float(np.abs(one - turned).max()) <= tolerance for turned in turns)


def _blocks(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = Image.fromarray(frame.mean(axis=-1, dtype=np.float32))
    return np.asarray(grey.resize((BLOCKS, BLOCKS), Image.Resampling.BOX))
