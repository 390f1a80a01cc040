"""Which episodes of a dataset are used: skip list, success, and what to do with those that cannot be read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from vlafit.datasets.card import Card
from vlafit.errors import DataError
from vlafit.observations import short

log = logging.getLogger(__name__)


def is_success(values: object, where: str) -> bool:
    """Whether one of the values of a success is true. Raises DataError unless each is true or false."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.size == 0 or array.size != max(array.shape, default=1):
        raise DataError(f"{where} is {short(values)}, not true or false, or one of them for each step")
    odd = array[(array != 0) & (array != 1)]
    if odd.size:
        raise DataError(f"{where} holds {odd.ravel()[0]:g}, not true or false (1 or 0)")
    return bool(array.any())


def is_skipped(card: Card, episode: str) -> bool:
    """Whether the skip list of a card names an episode."""
    return any(fnmatchcase(episode, pattern) for pattern in card.episodes.skip)


@dataclass(frozen=True)
class LeftOut:
    """An episode that is in the files and not in the store."""

    id: str
    reason: str


class NothingLeftError(DataError):
    """All episodes of a dataset are left out."""

    def __init__(self, text: str, left_out: tuple[LeftOut, ...]) -> None:
        super().__init__(text)
        self.left_out = left_out


class Selection:
    """The choice of a card's [episodes] while a layout lists them; `left_out` keeps what it refused."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.left_out: list[LeftOut] = []
        self._unused = set(card.episodes.skip)
        self._first = ""

    def wants(self, episode: str) -> bool:
        """Whether the skip list has nothing against an episode."""
        self._first = self._first or episode
        matching = {p for p in self.card.episodes.skip if fnmatchcase(episode, p)}
        self._unused -= matching
        if matching:
            self.left_out.append(LeftOut(episode, "on the skip list of the card"))
        return not matching

    def fails(self, episode: str) -> None:
        """Leave out an episode without success."""
        self.left_out.append(LeftOut(episode, f"{self.card.episodes.success} is false"))

    @contextmanager
    def guard(self, episode: str) -> Iterator[None]:
        """Leave out an episode that raises DataError if the card allows it."""
        try:
            yield
        except DataError as error:
            if self.card.episodes.on_bad == "stop":
                raise
            log.warning("left out episode %s: %s", episode, error)
            self.left_out.append(LeftOut(episode, str(error)))

    def finish(self, where: str, count: int) -> tuple[LeftOut, ...]:
        """Return what was left out. Raises DataError if nothing is left, or a skipped id is not there."""
        if self._unused:
            example = f"; an id is {self._first!r}, a pattern '*/{self._first.rpartition('/')[2]}'"
            raise DataError(
                f"{where}: episodes.skip names what is not there: {', '.join(sorted(self._unused))}"
                f"{example if self._first else ''}"
            )
        if not count:
            first = f"; the first: {self.left_out[0].id}: {self.left_out[0].reason}" if self.left_out else ""
            text = f"{where}: no episode is left of {len(self.left_out)}{first}"
            raise NothingLeftError(text, tuple(self.left_out))
        return tuple(self.left_out)
