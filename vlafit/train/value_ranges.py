"""Inspect the data under the statistics in use: which dimensions are normalised to extreme values.

A card in other units than the checkpoint's, or statistics of another robot, give normalised values in the
hundreds. Training on them ends without an error and with a useless policy, so they are one before it begins.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.agreement import Item
from vlafit.codec import Codec, Normaliser
from vlafit.datasets import blocks_for_statistics
from vlafit.errors import ConfigError, did_you_mean
from vlafit.train.data import Data
from vlafit.types import Feature

FAR = 10.0  # normalised values beyond this are counted; a z-score of 10 has at most 1 % of any data
MOST_FAR = 0.01  # a larger share of them is an error
FURTHEST = 100.0  # any value beyond this is an error; fitted statistics give at most 50
SAMPLE = 200  # episodes of each dataset


@dataclass(frozen=True)
class Range:
    """How far the normalised values of one dimension of one dataset go."""

    dataset: str
    column: str
    dimension: str
    """Its label, else its number."""
    index: int
    far: float
    """Share of values whose magnitude is above `FAR`."""
    largest: float
    """Largest magnitude."""

    @property
    def names(self) -> tuple[str, str]:
        """Names for it that `adapt.outside` accepts: by label and by number."""
        return f"{self.column}.{self.dimension}", f"{self.column}.{self.index}"

    @property
    def is_extreme(self) -> bool:
        return self.far > MOST_FAR or self.largest > FURTHEST

    def text(self) -> str:
        """Return the range in a few words."""
        share = f" ({self.far:.2%} beyond {FAR:g})" if self.far else ""
        return f"{self.dimension} {self.largest:.3g}{share}"


def measure(data: Data, codec: Codec) -> list[Range]:
    """Return the range of every dimension, on a sample of the training episodes of every dataset."""
    config, ranges = codec.config, []
    for store, ids in zip(data.stores, data.training, strict=True):
        if not ids:
            continue
        places = np.linspace(0, len(ids) - 1, min(SAMPLE, len(ids))).round().astype(int)
        sample = [ids[place] for place in dict.fromkeys(places.tolist())]
        columns = blocks_for_statistics([store], [sample], config.chunk, config.relative)
        methods = (config.normalisation, config.of_actions)
        features: tuple[Feature, Feature] = (codec.embodiment.state, codec.embodiment.action)
        for name, blocks, method, feature in zip(
            ("state", "action"), columns, methods, features, strict=True
        ):
            normaliser = Normaliser.fit(codec.statistics[name], method)
            far, largest = _far_and_largest(blocks, normaliser, feature.shape[0])
            for index in range(feature.shape[0]):
                label = feature.labels[index] if feature.labels else str(index)
                size = float(far[index]), float(largest[index])
                ranges.append(Range(store.card.name, name, label, index, *size))
    return ranges


def _far_and_largest(
    blocks: Iterable[NDArray], normaliser: Normaliser, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count, far, largest = 0, np.zeros(width), np.zeros(width)
    for block in blocks:
        size = np.abs(normaliser.encode(np.asarray(block, np.float64)))
        count += len(size)
        far += (size > FAR).sum(axis=0)
        largest = np.maximum(largest, size.max(axis=0, initial=0.0))
    return far / max(count, 1), largest


def items(data: Data, codec: Codec, permitted: Sequence[str], fitted: bool) -> Iterator[Item]:
    """Return an item for each column, and one for each extreme dimension: a conflict unless `permitted`.

    `permitted` is `adapt.outside`, `fitted` whether the statistics are the dataset's own. Raises ConfigError
    for a permitted dimension that does not exist.
    """
    ranges = measure(data, codec)
    known = [name for one in ranges for name in one.names]
    for name in permitted:
        if name not in known:
            raise ConfigError(
                f"adapt.outside: the robot has no dimension {name!r}{did_you_mean(name, known)}; "
                f"it has: {', '.join(dict.fromkeys(one.names[0] for one in ranges))}"
            )
    for column in ("state", "action"):
        mine = [one for one in ranges if one.column == column]
        texts = [
            f"{dataset}: " + ", ".join(one.text() for one in mine if one.dataset == dataset)
            for dataset in dict.fromkeys(one.dataset for one in mine)
        ]
        largest = max(one.largest for one in mine)
        value = f"largest {largest:.3g}"
        yield Item(f"normalised {column}", {"dataset": "; ".join(texts)}, value, "same")
    for one in ranges:
        if one.is_extreme:
            yield _extreme(one, codec, permitted, fitted)


def _extreme(one: Range, codec: Codec, permitted: Sequence[str], fitted: bool) -> Item:
    name = f"normalised {one.names[0]}"
    text = f"{one.dataset}: {one.far:.1%} of the values beyond {FAR:g}, largest {one.largest:.3g}"
    sides = {"dataset": text}
    if set(one.names) & set(permitted):
        return Item(name, sides, "as it is", "chosen", "adapt.outside")
    if not fitted:
        seen = codec.statistics[one.column]
        sides["checkpoint"] = (
            f"statistics of mean {seen.mean[one.index]:.3g}, std {seen.std[one.index]:.3g} in its units"
        )
    permit = f'if such values are meant: [adapt] outside = ["{one.names[0]}"]'
    remedy = (
        'normalise otherwise (data.normalisation = "mean_std")'
        if fitted
        else "are the card's units those of the checkpoint (degrees, radians; m, mm; 0 to 1, 0 to 100), and "
        'the statistics this robot\'s? Else fit new ones: data.statistics = "data"'
    )
    return Item(name, sides, "", "conflict", fix=f"{remedy}; {permit}")
