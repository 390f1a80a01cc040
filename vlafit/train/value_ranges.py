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
SHIFTED = 3.0  # mean of a dimension beyond which it is reported; by Cantelli's inequality at most 10 % of the
# data that the statistics are of lies there. Our own datasets stay below 0.8 under one another's statistics.
FOREIGN = 4.0  # and beyond which it is an error: at most 6 %; columns in another order give 4.3 to 6
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
    mean: float
    """Mean of the normalised values."""
    beyond: float
    """Share of values whose magnitude is above `SHIFTED`."""

    @property
    def names(self) -> tuple[str, str]:
        """What `adapt.outside` may call it: by label and by number."""
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

    def text(self) -> str:
        """Return the range in a few words."""
        share = f" ({self.far:.2%} beyond {FAR:g})" if self.far else ""
        mean = f" (mean {self.mean:.3g})" if self.is_shifted else ""
        return f"{self.dimension} {self.largest:.3g}{share}{mean}"


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
            sizes = _sizes(blocks, normaliser, feature.shape[0])
            for index in range(feature.shape[0]):
                label = feature.labels[index] if feature.labels else str(index)
                far, largest, mean, beyond = (float(one[index]) for one in sizes)
                ranges.append(Range(store.card.name, name, label, index, far, largest, mean, beyond))
    return ranges


def _sizes(
    blocks: Iterable[NDArray], normaliser: Normaliser, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return of each dimension the share beyond `FAR`, the largest, the mean, the share beyond `SHIFTED`."""
    count = 0
    far, largest, total, beyond = (np.zeros(width) for _ in range(4))
    for block in blocks:
        values = normaliser.encode(np.asarray(block, np.float64))
        size = np.abs(values)
        count += len(size)
        far += (size > FAR).sum(axis=0)
        beyond += (size > SHIFTED).sum(axis=0)
        total += values.sum(axis=0)
        largest = np.maximum(largest, size.max(axis=0, initial=0.0))
    rows = max(count, 1)
    return far / rows, largest, total / rows, beyond / rows


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
        if one.is_extreme or (one.is_foreign and not fitted):
            yield _extreme(one, codec, permitted, fitted)
        elif one.is_shifted:
            yield _shifted(one)


def _extreme(one: Range, codec: Codec, permitted: Sequence[str], fitted: bool) -> Item:
    name = f"normalised {one.names[0]}"
    text = f"{one.dataset}: {one.far:.1%} of the values beyond {FAR:g}, largest {one.largest:.3g}"
    if one.is_foreign:
        text += f", mean {one.mean:.3g}"
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
        else "are the card's units those of the checkpoint (degrees, radians; m, mm; 0 to 1, 0 to 100), "
        "the columns in its order, and the statistics this robot's? robot.state and robot.action of a card "
        'convert units (`scale`). Else fit new statistics: data.statistics = "data"'
    )
    return Item(name, sides, "", "conflict", fix=f"{remedy}; {permit}")


def _shifted(one: Range) -> Item:
    text = f"{one.dataset}: mean {one.mean:.3g}, {one.beyond:.0%} of the values beyond {SHIFTED:g}"
    reason = "most values lie where few of the statistics' data lay: the same column, unit and zero?"
    return Item(f"normalised {one.names[0]}", {"dataset": text}, "as it is", "differs", reason)
