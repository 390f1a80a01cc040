"""Measure throughput between two logged steps: samples, tokens, arithmetic, and the wait for data."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import final

import torch

from vlafit.recipe import TrainRecipe
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import peak_flops
from vlafit.train.loop import StepResult

log = logging.getLogger(__name__)

TIMED = (
    "train/samples_per_s",
    "train/tokens_per_s",
    "train/data_share",
    "train/tflops_per_s",
    "train/mfu",
)
"""Names of the metrics of `Instruments`."""


@final
class Instruments:
    """Adds up steps; `values` returns their means, and begins anew."""

    def __init__(self, batch_size: int, peak: float | None, flops: Callable[[BatchShape], int]) -> None:
        """`flops` counts a micro-batch; it is only called where the `peak` in FLOP/s is known."""
        self._batch_size, self._peak, self._flops = batch_size, peak, flops
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._tokens = 0.0
        self._shapes: Counter[BatchShape] = Counter()

    def use(self, flops: Callable[[BatchShape], int]) -> None:
        """Count by `flops` from now on, because another stage began."""
        self._flops = flops
        self._clear()  # the steps before would be counted as of this stage

    def add(self, result: StepResult) -> None:
        """Add a step."""
        self._steps += 1
        self._seconds += result.seconds
        self._data_seconds += result.data_seconds
        self._tokens += result.tokens
        self._shapes.update(result.shapes)

    def values(self) -> dict[str, float]:
        """Return the means over the steps since the last call, by the metric's name.

        Samples and tokens are those of all processes. `train/mfu` is the share of its peak that this
        process's device reached, over all of the step, the wait for data included.
        """
        if not self._steps or self._seconds <= 0:
            return {}
        values = {
            "train/samples_per_s": self._steps * self._batch_size / self._seconds,
            "train/data_share": self._data_seconds / self._seconds,
        }
        if self._tokens:
            values["train/tokens_per_s"] = self._tokens / self._seconds
        if self._peak is not None and self._shapes:
            flops = sum(times * self._flops(shape) for shape, times in self._shapes.items())
            values["train/tflops_per_s"] = flops / self._seconds / 1e12
            values["train/mfu"] = flops / self._seconds / self._peak
        self._clear()
        return values


def known_peak(recipe: TrainRecipe, device: torch.device) -> float | None:
    """Return the peak of one device in FLOP/s; where it is not known, say how to give it."""
    peak = peak_flops(recipe.peak_tflops, device, recipe.precision)
    if peak is None and device.type == "cuda":
        log.info(
            "train/mfu is not logged, because the peak of %s in %s is not known; give it with "
            "--train.peak_tflops",
            torch.cuda.get_device_name(device), recipe.precision,
        )  # fmt: skip
    return peak
