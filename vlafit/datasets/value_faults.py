"""Say which values the statistics in use do not describe: extreme, tiny or wild ones.

A dataset in other units than the checkpoint's, or statistics of another robot, give normalised values in the
hundreds, or all within a fiftieth of what the statistics describe. Training on either ends without an error
and with a useless policy, and an evaluation measures nothing, so both are an error before they begin.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlafit.agreement import Item
from vlafit.codec import Codec
from vlafit.codec.unit_scales import SMALLER
from vlafit.datasets import episode_units
from vlafit.datasets.statistics import blocks_for_statistics
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.value_ranges import (
    COLUMNS,
    FAR,
    SHIFTED,
    Column,
    Range,
    fraction,
    measure,
    plain,
    sample,
)
from vlafit.errors import MOST_NAMES, ConfigError, nearest

LARGEST_SHOWN = 3  # dimensions in a console's line about a column of many
FREE = 2  # dimensions, and at most a quarter, that may keep their unit where all others changed it: grippers
WILD = 1e4  # a value as many times further away than the others are large is an error: no robot records it
ABSURD = 1e9  # and one beyond this, however many there are, is of no unit
LONE = (
    3.0  # rows up to which what stretches the statistics is a fault of recording, and no gripper that closed
)
ALIKE = 0.1  # width of all other values, normalised, by which these are alike: 1/20 of -1 to 1, as `NARROW`
SINGLE = 20.0  # widths between the 1 % and the 99 % quantile by which a value is reported; normal data has 1
FEW = 20_000  # rows up to which the most extreme are left out by number, because 1 % may be one wild value
EXACT = 1.25  # times from a factor of `SMALLER` up to which it is that factor


@dataclass(frozen=True)
class Remedies:
    """What the command that asks can do about values that the statistics do not describe."""

    refit: str = 'Else fit new statistics: data.statistics = "data"'
    permit: str = "if such values are meant: [adapt] outside = [{}]"
    """Says how dimensions are permitted, whose names replace {}."""
    quote: str = '"'
    """Around each name."""
    chosen: str = "adapt.outside"
    question: str = (
        "are the card's units those of the checkpoint (degrees, radians; m, mm; 0 to 1, 0 to 100), the "
        "columns in its order, and the statistics this robot's? robot.state and robot.action of a card "
        "convert units (`scale`)."
    )
    """What may be wrong with values that other data's statistics do not describe."""
    side: str = "checkpoint"
    """Whose the statistics are."""

    def permitting(self, names: Sequence[str]) -> str:
        """Return how to permit the dimensions `names`."""
        comma = ", " if self.quote else " "
        return self.permit.format(comma.join(f"{self.quote}{name}{self.quote}" for name in names))


TRAINING = Remedies()
HELD_OUT = Remedies(
    refit="Else leave the episode out (episodes.skip in the card)",
    question="is a held-out episode in other units than those trained on, or of another robot or gripper?",
    side="statistics",
)


def of_run(
    stores: Sequence[EpisodeStore],
    training: Sequence[Sequence[str]],
    held_out: Sequence[Sequence[str]],
    codec: Codec,
    permitted: Sequence[str],
    fitted: bool,
) -> Iterator[Item]:
    """Return the items of a run's training episodes, and of its held-out ones under the same statistics."""
    yield from items(stores, training, codec, permitted, fitted)
    if any(held_out):
        remedies = HELD_OUT if fitted else replace(TRAINING, refit=HELD_OUT.refit)
        every = items(stores, held_out, codec, permitted, fitted, remedies, "held-out episodes")
        yield from (item for item in every if item.status != "differs")


def items(
    stores: Sequence[EpisodeStore],
    episodes: Sequence[Sequence[str]],
    codec: Codec,
    permitted: Sequence[str],
    fitted: bool,
    remedies: Remedies = TRAINING,
    part: str = "",
) -> Iterator[Item]:
    """Return an item for each column, and one for each fault: a conflict unless its dimensions are permitted.

    `permitted` is `adapt.outside`, `fitted` whether the statistics are of these `episodes` of the `stores`,
    or, where `part` names them, of others in the same dataset. Raises ConfigError for a permitted dimension
    that does not exist.
    """
    own, of_part = fitted and not part, f", {part}" if part else ""
    ranges = measure(stores, episodes, codec, own)
    known = [name for one in ranges for name in one.names]
    for name in permitted:
        if name not in known:
            column = name in ("state", "action")
            near = "; name its dimensions one by one" if column else nearest(name, known)
            raise ConfigError(
                f"{remedies.chosen}: the robot has no dimension {name!r}{near}; "
                f"it has: {', '.join(dict.fromkeys(one.names[0] for one in ranges))}"
            )
    datasets = list(dict.fromkeys(one.dataset for one in ranges))
    for column in ("state", "action"):
        mine = [one for one in ranges if one.column == column]
        of_each = [[one for one in mine if one.dataset == dataset] for dataset in datasets]
        text, short = ("; ".join(map(say, of_each)) for say in (_every_range, _notable_ranges))
        value = f"largest {max(one.largest for one in mine):.3g}"
        name = f"normalised {column}{of_part}"
        yield Item(name, {"dataset": text}, value, "same", short={text: short})
    for column in ("state", "action"):
        for dataset in datasets:
            mine = [one for one in ranges if (one.column, one.dataset) == (column, dataset)]
            if not own or len(datasets) > 1:  # one dataset's own statistics describe it
                for item in _narrow(mine, codec, permitted, own, remedies):
                    yield replace(item, name=f"{item.name}{of_part}")
    by_name = {store.card.name: (store, sample(ids)) for store, ids in zip(stores, episodes, strict=True)}
    extreme = [one for one in ranges if one.is_extreme or (one.is_foreign and not fitted)]
    refused = [one.names[0] for one in extreme if not set(one.names) & set(permitted)]
    for one in extreme:
        store, ids = by_name[one.dataset]
        middle = float(codec.seen[one.column].mean[one.index])
        place = _furthest([store], [ids], codec, one.column, one.index, middle)[1]
        item = _extreme(one, codec, place, own, refused, remedies)
        yield replace(item, name=f"{item.name}{of_part}")
    for one in ranges:
        if one.is_shifted and one not in extreme:
            item = _shifted(one)
            yield replace(item, name=f"{item.name}{of_part}")
    lost = [one for one in ranges if one.is_lost and one not in extreme]
    for item in _lost(lost, codec, permitted, own, remedies):
        yield replace(item, name=f"{item.name}{of_part}")
    if own:
        yield from _single_values(stores, episodes, codec, permitted, remedies)
        features = (codec.embodiment.state, codec.embodiment.action)
        for store, ids in zip(stores, episodes, strict=True):
            yield from episode_units.items(
                store, ids, features, FREE, permitted, remedies.permitting, remedies.chosen
            )


def _every_range(ranges: Sequence[Range]) -> str:
    return f"{ranges[0].dataset}: " + ", ".join(one.text() for one in ranges)


def _notable_ranges(ranges: Sequence[Range]) -> str:
    """Return the largest of many ranges, and those that have something to say, for a console."""
    if len(ranges) <= MOST_NAMES:
        return _every_range(ranges)
    largest = sorted(ranges, key=lambda one: -one.largest)[:LARGEST_SHOWN]
    chosen = [one for one in ranges if one in largest or one.has_note]
    if len(chosen) > MOST_NAMES:
        chosen = largest
    return f"{_every_range(chosen)}; {len(ranges) - len(chosen)} more"


def _extreme(
    one: Range, codec: Codec, place: str, fitted: bool, refused: Sequence[str], remedies: Remedies
) -> Item:
    """Return the item of an extreme dimension; the remedy is one for all that are `refused`."""
    name = f"normalised {one.names[0]}"
    text = f"{one.dataset}: {one.far:.1%} of the values beyond {FAR:g}, largest {one.largest:.3g} ({place})"
    if one.is_foreign:
        text += f", mean {one.mean:.3g}"
    sides = {"dataset": text}
    if one.names[0] not in refused:
        return Item(name, sides, "as it is", "chosen", remedies.chosen)
    if not fitted:
        seen = codec.seen[one.column]
        of = "statistics of " if remedies.side == "checkpoint" else ""
        mean, std = seen.mean[one.index], seen.std[one.index]
        sides[remedies.side] = f"{of}mean {mean:.3g}, std {std:.3g} in its units"
    remedy = (
        'normalise otherwise (data.normalisation = "mean_std")'
        if fitted
        else f"{remedies.question} {remedies.refit}"
    )
    permit = remedies.permitting(list(dict.fromkeys(refused)))
    return Item(name, sides, "", "conflict", fix=f"{remedy}; {permit}")


def _lost(
    ranges: Sequence[Range], codec: Codec, permitted: Sequence[str], fitted: bool, remedies: Remedies
) -> Iterator[Item]:
    """Return an item for each dimension that moves, and of which clipping leaves nothing.

    Quantiles of a gripper that moves in less than 1 % of the rows are equal: programs that clip by them make
    every value the same, and the policy never moves it.
    """
    refused = [one.names[0] for one in ranges if not set(one.names) & set(permitted)]
    for one in ranges:
        method = codec.config.normalisation if one.column == "state" else codec.config.of_actions
        name = f"clipped {one.names[0]}"
        sides = {
            "dataset": f"{one.dataset}: moves by {one.range:.3g}, of which {method} keeps {one.kept:.3g}"
        }
        if one.names[0] not in refused:
            yield Item(name, sides, "as it is", "chosen", remedies.chosen)
            continue
        if not fitted:  # its policy was trained so
            reason = "it hardly ever moved in the statistics' data, and this policy never moves it"
            yield Item(name, sides, "as it is", "differs", reason)
            continue
        remedy = 'normalise otherwise (data.normalisation = "groot_min_max", "quantile" or "mean_std")'
        permit = remedies.permitting(list(dict.fromkeys(refused)))
        yield Item(name, sides, "", "conflict", fix=f"{remedy}; {permit}")


def _shifted(one: Range) -> Item:
    text = f"{one.dataset}: mean {one.mean:.3g}, {one.beyond:.0%} of the values beyond {SHIFTED:g}"
    reason = "most values lie where few of the statistics' data lay: the same column, unit and zero?"
    return Item(f"normalised {one.names[0]}", {"dataset": text}, "as it is", "differs", reason)


def _narrow(
    column: Sequence[Range], codec: Codec, permitted: Sequence[str], fitted: bool, remedies: Remedies
) -> Iterator[Item]:
    """Return an item if dimensions of one column of one dataset move by less than `NARROW`.

    It is a conflict where nearly all of those that move do: one joint may rest, but all joints at once are
    in another unit.
    """
    narrow = [one for one in column if one.is_narrow]
    if not narrow:
        return
    moving = [one for one in column if one.moves and not np.isnan(one.spread)]
    first = narrow[0]
    listed = ", ".join(f"{one.dimension} {fraction(one.spread)}" for one in narrow)
    spread = {
        "dataset": f"{first.dataset}: {len(narrow)} of the {len(moving)} dimensions that move have a small "
        f"part of the statistics' spread ({listed})"
    }
    factor = float(np.median([1 / one.spread for one in narrow]))
    guess = _guess(factor)
    name = f"spread of {first.column}"
    open_ = [one for one in narrow if not set(one.names) & set(permitted)]
    rest = len(moving) - len(open_)
    together = len(moving) > 1 or len(column) == 1
    if not together or rest > min(FREE, len(moving) // 4):
        if not open_:
            yield Item(name, spread, "as it is", "chosen", remedies.chosen)
            return
        reason = f"a joint that hardly moves is normal; else: {guess}?"
        yield Item(name, spread, "as it is", "differs", reason)
        return
    seen = codec.seen[first.column].std
    own = ", ".join(f"{one.dimension} {seen[one.index]:.3g}" for one in narrow)
    spread[remedies.side if not fitted else "statistics"] = f"std {own}"
    convert = f"robot.{first.column}.scale of the card"
    if fitted:
        remedy = f"the cards are of different units ({guess}): convert one of them by {convert}"
    else:
        remedy = f"about {plain(factor)} times less: {guess}? Convert by {convert}. {remedies.refit}"
    permit = remedies.permitting([one.names[0] for one in narrow])
    yield Item(name, spread, "", "conflict", fix=f"{remedy}; {permit}")


def _guess(factor: float) -> str:
    """Return which units may be mixed up where values are `factor` times smaller, the nearest first.

    Only the nearest where it is the factor; else others, too, because the data of one task are narrower.
    """
    near = sorted((abs(np.log(factor / scale)), text) for scale, text in SMALLER.items())
    if near[0][0] < np.log(EXACT):
        return near[0][1]
    likely = [text for scale, text in SMALLER.items() if 1 / 3 < factor / scale < 10]
    return "; or ".join(t for _, t in near if t in likely) or "another unit than the statistics'"


def _single_values(
    stores: Sequence[EpisodeStore],
    episodes: Sequence[Sequence[str]],
    codec: Codec,
    permitted: Sequence[str],
    remedies: Remedies,
) -> Iterator[Item]:
    """Return an item for each dimension of fitted statistics that few values stretch.

    Normalised by such statistics, no value is extreme, and all others are alike.
    """
    named = (codec.columns.state_labels, codec.columns.action_labels)
    for column, labels in zip(COLUMNS, named, strict=True):
        statistics = codec.seen[column]
        repeated = _repeated(codec, column)
        low, high = _usual(stores, episodes, codec, column, repeated)
        least, most = statistics.array("min"), statistics.array("max")
        width, distance = high - low, np.maximum(most - high, low - least)
        usual = np.max([np.ones_like(width), width, np.abs(low), np.abs(high)], axis=0)
        wild = (distance > WILD * usual) | (np.maximum(most, -least) > ABSURD)
        single = (width > 0) & (distance > SINGLE * width)
        # Their share of the squared deviations tells how many rows lie that far out.
        rows = np.divide(statistics.std**2, distance**2, out=np.ones_like(width), where=distance > 0)
        lone = rows * statistics.count <= LONE * repeated
        wild |= single & lone & (_normalised_width(codec, column, low, high) < ALIKE)
        for index in np.flatnonzero(wild | single).tolist():
            label = labels[index] if labels else str(index)
            names = (f"{column}.{label}", f"{column}.{index}")
            name = f"single values of {names[0]}"
            centre = (low + high) / 2
            dataset, place = _furthest(stores, episodes, codec, column, index, centre[index])
            sides = {
                "dataset": f"{dataset}: {place}; nearly all of its values are from {low[index]:.3g} to "
                f"{high[index]:.3g}"
            }
            if set(names) & set(permitted):
                yield Item(name, sides, "as it is", "chosen", remedies.chosen)
            elif wild[index]:
                fix = (
                    "fitted statistics would make all other values the same: correct the file, or leave the "
                    f"episode out (episodes.skip in the card); {remedies.permitting(names[:1])}"
                )
                yield Item(name, sides, "", "conflict", fix=fix)
            else:
                reason = "few values stretch the statistics, and bring the others closer together; right?"
                yield Item(name, sides, "as it is", "differs", reason)


def _normalised_width(
    codec: Codec, column: Column, low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far apart two values of each dimension [d] are, normalised; infinite where nothing is."""
    normaliser = codec.normaliser_of(column)
    width = np.abs(normaliser.encode(high) - normaliser.encode(low))
    return np.where(codec.is_normalised(column), width, np.inf)


def _repeated(codec: Codec, column: Column) -> int:
    """Return how often statistics count a row: a relative action is in every chunk that covers it."""
    return codec.config.chunk if column == "action" and codec.columns.is_relative else 1


def _usual(
    stores: Sequence[EpisodeStore],
    episodes: Sequence[Sequence[str]],
    codec: Codec,
    column: Column,
    repeated: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return between which values [d] all but few lie: 98 %, or all but two at each end of few rows.

    Each row counts `repeated` times.
    """
    statistics, config = codec.seen[column], codec.config
    if statistics.count > FEW:
        return statistics.array("q01"), statistics.array("q99")
    blocks = blocks_for_statistics(stores, episodes, config.chunk, columns=codec.columns)
    rows = np.sort(np.concatenate([*blocks[column == "action"]]).astype(np.float64), axis=0)
    ends = min(max(2 * repeated, -(-len(rows) // 100)), (len(rows) - 1) // 2)
    return rows[ends], rows[-1 - ends]


def _furthest(
    stores: Sequence[EpisodeStore],
    episodes: Sequence[Sequence[str]],
    codec: Codec,
    column: Column,
    index: int,
    centre: float,
) -> tuple[str, str]:
    """Return the dataset, and episode, step and value, of what lies furthest from `centre` in a dimension.

    A relative action is looked at as the difference from the state of its own step; where the dimension is
    the robot's own, the value is the recorded one.
    """
    size, dataset, place = -1.0, "", ""
    columns = codec.columns
    for store, ids in zip(stores, episodes, strict=True):
        for identity in ids:
            episode = store.index(identity)
            states = store.state(episode)
            rows = states if column == "state" else store.actions(episode).astype(np.float64)
            learned = columns.states(states) if column == "state" else columns.actions(rows, states)
            values = (rows if rows.shape == learned.shape else learned)[:, index].astype(np.float64)
            away = np.abs(learned[:, index] - centre)
            if len(away) and away.max() > size:
                step = int(away.argmax())
                size, dataset = float(away[step]), store.card.name
                place = f"{values[step]:.4g} in episode {identity}, step {step}"
    return dataset, place
