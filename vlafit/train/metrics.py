"""Metrics of a run: one JSON line for each event, and optionally accelerate's trackers.

Every event has `step`; events of training have `time_s` (training time, without rollouts):

    train/loss, train/lr, train/grad_norm
        every train.log_every steps
    train/samples_per_s, train/tokens_per_s, train/data_share
        with them, means over the steps since the last ones: tokens with padding, where the policy counts
        them; the share of the time that was spent waiting for data
    train/tflops_per_s, train/mfu
        with them, where the device's peak is known or `train.peak_tflops` gives it: the arithmetic that the
        model needs (`flops.py`), and its share of that peak, for the main process's device
    train/peak_memory_gb, train/memory/KIND_gb
        with them, in 10^9 bytes: the peak of the session so far, on a CPU of the process; and its parts
        (weights, gradients, optimiser, average, program, rest)
    train/lr/RULE
        with them, if the rules of the strategy have different learning rates: that of each, by its number
        and what it selects (`train/lr` is the first one's)
    train/rank/mean, train/rank/min, train/rank/max
        with them, while AdaLoRA is trained: the ranks that its layers kept at their last pruning
    train/stage
        when a stage of the strategy begins, counted from 1, if there are several; `step` is the number of
        steps finished before
    validation/loss, validation/action_error
        every train.validate_every steps
    eval/NAME/success
        after rollouts
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from vlafit import files
from vlafit.files import plain_bytes

log = logging.getLogger(__name__)


class Metrics:
    """Writes `metrics.jsonl` and forwards to trackers, only on the main process."""

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self.path = run / "metrics.jsonl"
        self._accelerator = accelerator
        self._main = accelerator.is_main_process

    def rewind(self, step: int | None, every: int = 1, goes_on: bool = False) -> None:
        """Remove what was logged after `step` (None: everything), because the resumed run logs it again.

        `every` is how often training is logged. A run that `goes_on` also loses what was only logged at
        `step` because it stopped there, and has the events of one that did not stop.
        """
        if not self._main:
            return
        if not self.path.is_file():
            if step:
                log.warning("%s is missing: the history up to step %d is lost", self.path, step)
            return
        kept, last, longest = [], 0, every
        for line in plain_bytes(self.path).splitlines():
            try:
                text = line.decode()
                event = files.parse_json(text)
                at = int(event["step"])
            except (ValueError, KeyError, TypeError, OverflowError):
                log.warning(
                    "%s: removing a line that is not a valid event, perhaps cut off by a crash", self.path
                )
                continue
            if step is None or at > step:
                continue
            longest, last = max(longest, at - last), max(last, at)  # `every` may have been larger before
            if not (goes_on and at == step and step % every and "train/loss" in event):
                kept.append(text + "\n")
        if step and step - last >= longest:
            log.warning(
                "%s: holds nothing after step %d, but the run goes on from step %d: that history is lost",
                self.path,
                last,
                step,
            )
        files.write_atomic(self.path, "".join(kept))

    def log_once(self, step: int, values: Mapping[str, float]) -> bool:
        """Write one event, unless the run already logged these names at this step before it was resumed.

        Return whether it was written.
        """
        if not self._main:
            return False
        logged = files.read_json_lines(self.path)
        if any(event["step"] == step and set(values) <= set(event) for event in logged):
            return False
        self.log(step, values)
        return True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event; non-finite values become null, so that the line is valid JSON."""
        if not self._main:
            return
        plain = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in values.items()}
        files.append_line(self.path, json.dumps({"step": step, **plain}))
        self._accelerator.log(dict(values), step=step)
