"""Show a training run on the console: the tuning table, progress, each evaluation, the report's path."""

import sys
from pathlib import Path

from vlafit.cli import rank
from vlafit.cli.console import Line, agreement_table, number, plan_table
from vlafit.recipe import Recipe
from vlafit.rollout import Record
from vlafit.train import RunSummary
from vlafit.train import run as run_recipe
from vlafit.train.callbacks import Callbacks
from vlafit.train.experiment import Experiment
from vlafit.train.loop import StepResult
from vlafit.train.stages import title
from vlafit.tuning import Plan


def train(recipe: Recipe, out: Path, *, resume: bool, resume_from: int | None = None, command: str) -> int:
    """Run a recipe, with output on the main process; return 130 if a signal stopped it."""
    view = TrainView(out) if rank() == 0 else None
    try:
        summary = run_recipe(
            recipe, out, resume=resume, resume_from=resume_from, command=command, callbacks=view
        )
    finally:
        if view is not None:
            view.close()
    if view is not None:
        view.end(summary)
    return 0 if summary.finished else 130


class TrainView(Callbacks):
    """Prints the progress of a run."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._line: Line | None = None
        self._phase = ""
        self._successes = 0
        self._last: dict[str, float] = {}

    def setup(self, experiment: Experiment) -> None:
        """Print what is trained and on which data."""
        data = experiment.data
        episodes = sum(len(ids) for ids in data.training)
        held_out = sum(len(ids) for ids in data.validation)
        print(f"{experiment.load_report}")
        print(
            f"{episodes} training episodes, {held_out} held out, from {', '.join(c.name for c in data.cards)}"
        )
        if experiment.agreement is not None:
            print(agreement_table(experiment.agreement))
        self._table(experiment.plan)
        for warning in experiment.warnings:
            print(warning, file=sys.stderr)

    def stage(self, plan: Plan, began: int) -> None:
        """Print what is trained in the stage that starts now."""
        self.close()
        print(f"from step {began} on:")
        self._table(plan)

    def _table(self, plan: Plan) -> None:
        if len(plan.strategy.stages) > 1:
            print(title(plan))
        print(plan_table(plan.rows()), flush=True)

    def phase(self, name: str) -> None:
        """Close the progress line of the previous phase."""
        self.close()
        self._phase = name.replace("_", " ")

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """Update the progress line."""
        if self._line is None:
            self._line = Line("training", total, start=result.step - 1)
            self._line.__enter__()
        self._last |= values
        loss = f"loss {number(self._last.get('train/loss', result.loss))}"
        held_out = self._last.get("validation/loss")
        text = loss if held_out is None else f"{loss}  validation {number(held_out)}"
        self._line.update(result.step, text)

    def episode(self, done: int, total: int, record: object) -> None:
        """Update the progress line of an evaluation."""
        if self._line is None:
            self._line = Line(self._phase, total, start=done - 1)
            self._line.__enter__()
            self._successes = 0
        self._successes += isinstance(record, Record) and record.success is True
        self._line.update(done, f"{self._successes} successes")

    def close(self) -> None:
        """Close the progress line."""
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None

    def end(self, summary: RunSummary) -> None:
        """Print the success rates and the path of the report."""
        if not summary.finished:
            print(
                f"stopped after step {summary.steps}; continue with the same command and --resume",
                file=sys.stderr,
            )
            return
        for name, share in summary.success.items():
            invalid = summary.invalid.get(name)
            counted = "" if invalid is None else f"; {invalid}"
            print(f"success {name.replace('_', ' ')}: {share:.0%}{counted}")
        for name, sentence in summary.held_out.items():
            print(f"held-out episodes of {name}: {sentence}")
        if summary.report is not None:
            print(f"report: {summary.report}")
        else:
            print(f"run: {summary.folder}")
