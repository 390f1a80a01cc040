"""Say which episodes of a dataset are in another unit than its others.

Statistics that are fitted to all of them describe none: one episode of degrees among a hundred of radians
makes the others a fifth as wide, and no normalised value is extreme.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.agreement import Item
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.value_ranges import NARROW, STILL, plain, sample
from vlafit.types import Feature

FEWEST = 3  # episodes of which one can be compared with the others
UNITS = {180 / np.pi: "degrees among radians", 100.0: "0 to 100 among 0 to 1", 1000.0: "mm among m"}
NEAR = 2.0  # times from a factor of `UNITS` up to which it may be that one: episodes differ among themselves


def items(
    store: EpisodeStore,
    episodes: Sequence[str],
    features: tuple[Feature, Feature],
    free: int,
    permitted: Sequence[str],
    permitting: Callable[[Sequence[str]], str],
    chosen: str,
) -> Iterator[Item]:
    """Return an item for state and action if an episode moves 20 times as far as most do.

    A sample of the `episodes` is compared. It must in nearly all dimensions: up to `free`, and a quarter, may
    keep their unit.
    `permitting` returns how to permit dimensions, which `chosen` names, and `permitted` are those that are.
    """
    ids = sample(episodes)
    if len(ids) < FEWEST:
        return
    places = [store.index(identity) for identity in ids]
    for column, feature, read in zip(
        ("state", "action"), features, (store.state, store.actions), strict=True
    ):
        rows = [np.asarray(read(place), np.float64) for place in places]
        labels = feature.labels or tuple(map(str, range(feature.shape[0])))
        item = _of_column(store.card.name, ids, column, labels, rows, free, permitted, permitting, chosen)
        if item is not None:
            yield item


def _of_column(
    dataset: str,
    ids: Sequence[str],
    column: str,
    labels: Sequence[str],
    rows: Sequence[NDArray[np.float64]],
    free: int,
    permitted: Sequence[str],
    permitting: Callable[[Sequence[str]], str],
    chosen: str,
) -> Item | None:
    spread = np.stack([block.std(axis=0) for block in rows])  # [episodes, d]
    usual, whole = np.median(spread, axis=0), np.concatenate(rows).std(axis=0)
    moving = np.flatnonzero((usual > 0) & (usual > STILL * whole))
    if not len(moving) or (len(moving) == 1 and len(usual) > 1):
        return None
    times = spread[:, moving] / usual[moving]
    wide = times > 1 / NARROW
    odd = np.flatnonzero((~wide).sum(axis=1) <= min(free, len(moving) // 4))
    if not len(odd):
        return None
    worst = int(odd[np.median(times[odd], axis=1).argmax()])
    factor = float(np.median(times[worst][wide[worst]]))
    listed = ", ".join(f"{labels[d]} {plain(t)}" for d, t in zip(moving.tolist(), times[worst], strict=True))
    names = [f"{column}.{labels[d]}" for d in moving[wide[worst]].tolist()]
    more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
    sides = {"dataset": f"{dataset}: episode {ids[worst]}{more} moves {listed} times as far as most others"}
    name = f"episodes of {column}"
    numbers = [f"{column}.{d}" for d in moving[wide[worst]]]
    if all({a, b} & set(permitted) for a, b in zip(names, numbers, strict=True)):
        return Item(name, sides, "as it is", "chosen", chosen)
    nearest, guess = min(UNITS.items(), key=lambda unit: abs(np.log(factor / unit[0])))
    near = max(factor / nearest, nearest / factor) < NEAR
    question = f"{guess}?" if near else "in another unit, or of another robot?"
    fix = (
        f"{question} Correct the file, or leave the episode out (episodes.skip in the card); "
        f"{permitting(names)}"
    )
    return Item(name, sides, "", "conflict", fix=fix)
