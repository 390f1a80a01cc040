"""Metrics of a run: one JSON line an event, always; accelerate's trackers beside it, by choice.

Every event has `step`, and `time_s` (training time, without rollouts) where it belongs to training:

    train/loss, train/lr, train/grad_norm, train/samples_per_s, train/data_share, train/peak_memory_gb
        every train.log_every steps
    train/rank/mean, train/rank/min, train/rank/max
        with them, while AdaLoRA learns: of the ranks that its layers kept at their last pruning
    train/stage
        when a stage of the strategy begins, counted from 1, where there are several; `step` are the steps
        that were done before
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

log = logging.getLogger(__name__)


class Metrics:
    """Writes `metrics.jsonl` and forwards to trackers, on the main process alone."""

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self.path = run / "metrics.jsonl"
        self._accelerator = accelerator
        self._main = accelerator.is_main_process

    def rewind(self, step: int | None) -> None:
        """Drop what was logged after `step` (None: everything): the resumed run will log it again."""
        if not (self._main and self.path.is_file()):
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                at = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                log.warning("%s: dropping a line that is no event, cut off by a crash perhaps", self.path)
                continue
            if step is not None and at <= step:
                kept.append(line + "\n")
        files.write_atomic(self.path, "".join(kept))

    def log_once(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event, unless the run logged these names at this step before it was resumed."""
        if not self._main:
            return
        logged = files.read_json_lines(self.path)
        if not any(event["step"] == step and set(values) <= set(event) for event in logged):
            self.log(step, values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event; a value that is not finite is written as null, so that the line stays JSON."""
        if not self._main:
            return
        plain = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in values.items()}
        files.append_line(self.path, json.dumps({"step": step, **plain}))
        self._accelerator.log(dict(values), step=step)
