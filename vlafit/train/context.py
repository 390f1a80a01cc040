"""The experiment, folder, checkpoints and metrics that a run's trainer and evaluator share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vlafit import checkpoints, config
from vlafit.recipe import Recipe
from vlafit.train import saved_weights
from vlafit.train.callbacks import Callbacks
from vlafit.train.checkpointer import CheckpointManager
from vlafit.train.experiment import Experiment
from vlafit.train.memory import MemoryMeter
from vlafit.train.metrics import Metrics
from vlafit.tuning import Plan


@dataclass(frozen=True)
class RunContext:
    """Every process of a run has one; only the main process writes."""

    experiment: Experiment
    out: Path
    accelerator: Accelerator
    manager: CheckpointManager
    metrics: Metrics
    callbacks: Callbacks
    meter: MemoryMeter

    @property
    def recipe(self) -> Recipe:
        return self.experiment.recipe

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def write_policy(self, folder: Path, plan: Plan, weights: Mapping[str, Tensor] | None) -> None:
        """Write the native part of a checkpoint into `folder`; `weights` replace the policy's own."""
        base, changed = self.experiment.saved_on(plan)
        checkpoints.save(
            self.experiment.policy,
            folder,
            self.experiment.codecs,
            plan=plan,
            recipe=config.dump(self.recipe),
            history=self.experiment.history,
            weights=weights,
            base=base,
            changed=changed,
            agreement=self.experiment.agreement,
        )

    def describe_saved(self, folder: Path, plan: Plan) -> str:
        """Return the sizes of a checkpoint of the run in words."""
        return saved_weights.sizes(folder, self.experiment.saved_on(plan)[0])
