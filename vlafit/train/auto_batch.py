"""Choose the batch for `train.batch_size = "auto"`: the most samples whose forecast fits the memory.

It is chosen once, before anything is loaded, written into the run's recipe, and kept when the run is resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from vlafit.nn.policy import Policy
from vlafit.train.forecast import Forecast, Workload, forecast
from vlafit.train.memory_ladder import FEW_ROWS, Rung
from vlafit.tuning import Strategy

LARGEST = 256  # samples of an optimiser step: more change how a policy learns, and want another learning rate
SIZES = sorted({2**k for k in range(9)} | {3 * 2**k for k in range(7)})  # 1, 2, 3, 4, 6, 8, 12, ... 192, 256

OfRows = Callable[[Rung, int], Forecast]


def forecasts(policy: Policy, strategy: Strategy, workload: Workload) -> OfRows:
    """Return the forecast of a rung for the rows of a micro-batch; `policy` is on the meta device."""

    @cache
    def of(rung: Rung, rows: int) -> Forecast:
        changed = replace(
            workload,
            rows=rows * rung.micro_batches,
            micro_batches=rung.micro_batches,
            recompute=rung.recompute,
            states=rung.states,
            trained=rung.trained,
            in_backward=rung.in_backward,
        )
        return forecast(policy, strategy, changed)

    return of


def choose_rows(of: OfRows, rungs: Sequence[Rung], room: int, most: int) -> tuple[Rung, int] | None:
    """Return the rung and the rows of a micro-batch; None where not even one row fits into `room` bytes.

    It is the first rung, the fastest, on which `FEW_ROWS` rows fit, or else any at all; and the largest of
    `SIZES` up to `most` that fits there.
    """
    sizes = [size for size in SIZES if size <= most] or [1]
    for least in dict.fromkeys((min(FEW_ROWS, sizes[-1]), 1)):
        for rung in rungs:
            if of(rung, least).total <= room:
                return rung, _largest(lambda rows, rung=rung: of(rung, rows).total, sizes, least, room)
    return None


def _largest(total: Callable[[int], int], sizes: Sequence[int], fits: int, room: int) -> int:
    """Return the largest of `sizes` that fits, if `fits` does.

    A peak is convex in the rows (`memory_ladder.forecaster`), so the line between a size that fits and one
    that does not is never too low, and what it lets pass fits.
    """
    low, high = sizes.index(fits), len(sizes) - 1
    if total(sizes[high]) <= room:
        return sizes[high]
    while high - low > 1:
        (a, at_a), (b, at_b) = ((sizes[i], total(sizes[i])) for i in (low, high))
        reached = a + (b - a) * (room - at_a) / (at_b - at_a)
        middle = max([low + 1, *(i for i in range(low + 1, high) if sizes[i] <= reached)])
        if total(sizes[middle]) <= room:
            low = middle
        else:
            high = middle
    return sizes[low]
