"""Callbacks that a run calls as it progresses, for whoever displays it."""

from vlafit.train.experiment import Experiment
from vlafit.train.loop import StepResult
from vlafit.tuning import Plan


class Callbacks:
    """Does nothing; subclass it and override what you need (the command line shows a progress bar)."""

    def setup(self, experiment: Experiment) -> None:
        """Everything is loaded; training is about to begin."""

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """An optimiser step ended; `values` are the metrics that were logged at it, if any."""

    def stage(self, plan: Plan, began: int) -> None:
        """A later stage of the strategy began after `began` steps; `plan` is its plan."""

    def phase(self, name: str) -> None:
        """A new phase began: loading, training, evaluation, report."""

    def episode(self, done: int, total: int, record: object) -> None:
        """A rollout ended."""
