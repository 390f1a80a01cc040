"""Measure how far data goes under the statistics in use, dimension by dimension."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.codec import Codec, Normaliser, Statistics
from vlafit.codec.normaliser import NEAR_CONSTANT, MixedNormaliser
from vlafit.datasets.statistics import Blocks, blocks_for_statistics
from vlafit.datasets.store import EpisodeStore

FAR = 10.0  # normalised values beyond this are counted; a z-score of 10 has at most 1 % of any data
MOST_FAR = 0.01  # a larger share of them is an error
FURTHEST = 100.0  # any value beyond this is an error; fitted statistics give at most 50
SHIFTED = 3.0  # mean of a dimension beyond which it is reported; by Cantelli's inequality at most 10 % of the
# data that the statistics are of lies there. Our own datasets stay below 0.8 under one another's statistics.
FOREIGN = 4.0  # and beyond which it is an error: at most 6 %; columns in another order give 4.3 to 6
NARROW = 1 / 20  # of the statistics' spread. Degrees to radians is 1/57, percent 1/100, mm to m 1/1000. No
# single episode of our datasets, or of a humanoid's of 26 joints, has nearly all dimensions below it.
LOST = 1e-3  # of the recorded range: what decoding gives back where clipping leaves nothing of a movement
STILL = 1e-4  # of the statistics' spread: a dimension that moves less does not move
SAMPLE = 200  # episodes of each dataset
Column = Literal["state", "action"]
COLUMNS: tuple[Column, Column] = ("state", "action")


@dataclass(frozen=True)
class Range:
    """How far the normalised values of one dimension of one dataset go."""

    dataset: str
    column: Column
    dimension: str
    """Its label, else its number."""
    index: int
    far: float
    """Share of values whose magnitude is above `FAR`."""
    largest: float
    """Largest magnitude."""
    mean: float
    """Mean of the normalised values."""
    beyond: float
    """Share of values whose magnitude is above `SHIFTED`."""
    spread: float
    """Spread of the values as a share of what the statistics describe; NaN where these say nothing."""
    moves: bool
    """Whether the dimension moves at all."""
    range: float
    """Range of the values, in their units."""
    kept: float
    """Range of the values after encoding and decoding, which clipping makes smaller."""

    @property
    def names(self) -> tuple[str, str]:
        """Names for it that `adapt.outside` accepts: by label and by number."""
        return f"{self.column}.{self.dimension}", f"{self.column}.{self.index}"

    @property
    def is_extreme(self) -> bool:
        return self.far > MOST_FAR or self.largest > FURTHEST

    @property
    def is_shifted(self) -> bool:
        """Whether most of the values lie where few lay in the data that the statistics are of."""
        return abs(self.mean) > SHIFTED or self.beyond > 0.5

    @property
    def is_foreign(self) -> bool:
        return abs(self.mean) > FOREIGN

    @property
    def is_narrow(self) -> bool:
        """Whether it moves, by a small part of what the statistics describe."""
        return self.moves and self.spread < NARROW

    @property
    def is_lost(self) -> bool:
        """Whether it moves, and clipping leaves nothing of that."""
        return self.moves and self.kept < LOST * self.range

    @property
    def has_note(self) -> bool:
        """Whether `text` says more than the largest value."""
        return bool(self.far) or self.is_shifted or self.is_narrow or not self.moves

    def text(self) -> str:
        """Return the range in a few words."""
        share = f" ({self.far:.2%} beyond {FAR:g})" if self.far else ""
        mean = f" (mean {self.mean:.3g})" if self.is_shifted else ""
        narrow = f" (spread {fraction(self.spread)})" if self.is_narrow else ""
        still = "" if self.moves else " (never moves)"
        return f"{self.dimension} {self.largest:.3g}{share}{mean}{narrow}{still}"


def fraction(share: float) -> str:
    """Return a small share as 1/N."""
    return f"1/{plain(1 / share)}"


def plain(number: float) -> str:
    """Return a positive number with three digits and no exponent, or as a whole number from 1000 on."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def measure(
    stores: Sequence[EpisodeStore], episodes: Sequence[Sequence[str]], codec: Codec, own: bool
) -> list[Range]:
    """Return the range of every dimension, on a sample of the given `episodes` of every dataset.

    A codec that clips is measured without that, unless the statistics are the episodes' `own`: clipped, no
    value of other units would be far.
    """
    config, ranges = codec.config, []
    for store, ids in zip(stores, episodes, strict=True):
        if not ids:
            continue
        learned = codec.columns
        blocks = blocks_for_statistics([store], [sample(ids)], config.chunk, columns=learned)
        for name, rows, labels in zip(
            COLUMNS, blocks, (learned.state_labels, learned.action_labels), strict=True
        ):
            statistics = codec.seen[name]
            used = codec.normaliser_of(name)
            sizes = _sizes(rows, used if own else codec.unclipped(name), statistics, used)
            width = sizes.high - sizes.low
            # A dimension that was constant in the statistics may tremble.
            trembles = width <= NEAR_CONSTANT * np.maximum(1.0, np.abs(statistics.mean))
            spread = np.where(codec.is_normalised(name), _spread(sizes, statistics), np.nan)
            for index in range(statistics.dimensions):
                ranges.append(
                    Range(
                        dataset=store.card.name,
                        column=name,
                        dimension=labels[index] if labels else str(index),
                        index=index,
                        far=float(sizes.far[index]),
                        largest=float(sizes.largest[index]),
                        mean=float(sizes.mean[index]),
                        beyond=float(sizes.beyond[index]),
                        spread=float(spread[index]),
                        moves=bool(width[index] > STILL * statistics.std[index]),
                        range=float(width[index]),
                        kept=float(width[index] if trembles[index] else sizes.kept[index]),
                    )
                )
    return ranges


def sample(episodes: Sequence[str]) -> list[str]:
    """Return at most `SAMPLE` of the episodes, evenly spaced."""
    places = np.linspace(0, len(episodes) - 1, min(SAMPLE, len(episodes))).round().astype(int)
    return [episodes[int(place)] for place in dict.fromkeys(places.tolist())]


@dataclass(frozen=True)
class _Sizes:
    """Of each dimension [d]: normalised values, and the range and deviation of those that are recorded."""

    far: NDArray[np.float64]
    largest: NDArray[np.float64]
    mean: NDArray[np.float64]
    beyond: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    std: NDArray[np.float64]
    kept: NDArray[np.float64]


def _sizes(
    blocks: Blocks,
    normaliser: Normaliser | MixedNormaliser,
    statistics: Statistics,
    used: Normaliser | MixedNormaliser,
) -> _Sizes:
    """Return the sizes under `normaliser`, and what is kept of the range under the one in use."""
    width, count = statistics.dimensions, 0
    least, most = np.full(width, np.inf), np.full(width, -np.inf)
    far, largest, total, beyond, plain, squares = (np.zeros(width) for _ in range(6))
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for block in blocks:
        rows = np.asarray(block, np.float64)
        values = normaliser.encode(rows)
        size = np.abs(values)
        count += len(size)
        far += (size > FAR).sum(axis=0)
        beyond += (size > SHIFTED).sum(axis=0)
        total += values.sum(axis=0)
        largest = np.maximum(largest, size.max(axis=0, initial=0.0))
        centred = rows - statistics.mean  # so that a large offset does not cancel the digits
        plain += centred.sum(axis=0)
        squares += (centred * centred).sum(axis=0)
        low = np.minimum(low, rows.min(axis=0, initial=np.inf))
        high = np.maximum(high, rows.max(axis=0, initial=-np.inf))
        back = used.decode(used.encode(rows))
        least = np.minimum(least, back.min(axis=0, initial=np.inf))
        most = np.maximum(most, back.max(axis=0, initial=-np.inf))
    n = max(count, 1)
    std = np.sqrt(np.maximum(squares / n - (plain / n) ** 2, 0.0))
    return _Sizes(far / n, largest, total / n, beyond / n, low, high, std, most - least)


def _spread(sizes: _Sizes, statistics: Statistics) -> NDArray[np.float64]:
    """Return each dimension's deviation by the statistics', or its range by theirs where that is larger.

    The range counts because a program that recorded no deviation has half the range in its place. NaN for
    dimensions that are nearly constant in the statistics: they do not tell a unit.
    """
    told = statistics.std > 0
    share = np.divide(sizes.std, statistics.std, out=np.full_like(sizes.std, np.nan), where=told)
    if statistics.min is None or statistics.max is None:
        return share
    range_ = statistics.max - statistics.min
    told &= range_ > NEAR_CONSTANT * np.maximum(1.0, np.abs(statistics.mean))
    by_range = np.divide(sizes.high - sizes.low, range_, out=np.full_like(share, np.nan), where=told)
    return np.where(told, np.fmax(share, by_range), np.nan)
