"""What a run tells while it goes on, to whoever shows it."""

from vlafit.train.experiment import Experiment
from vlafit.train.loop import StepResult
from vlafit.tuning import Plan


class Observer:
    """Shows nothing; the command line's shows a line of progress."""

    def setup(self, experiment: Experiment) -> None:
        """All is made; training is about to begin."""

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """An optimiser step ended; `values` holds what was logged at it, if anything was."""

    def stage(self, plan: Plan, began: int) -> None:
        """A later stage of the strategy began after so many steps; `plan` says what learns from now on."""

    def phase(self, name: str) -> None:
        """A new phase began."""

    def episode(self, done: int, total: int, record: object) -> None:
        """A rollout ended."""
