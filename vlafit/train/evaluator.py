"""Closed-loop evaluations that belong to a run: of a checkpoint before, during and after training."""

import logging
from typing import final

from vlafit import rollout
from vlafit.actor import load_actor
from vlafit.errors import TrainingError
from vlafit.score import InvalidAnswers
from vlafit.train.context import RunContext
from vlafit.train.distributed import barrier
from vlafit.train.trackers import log_evaluation

log = logging.getLogger(__name__)


@final
class Evaluator:
    """Rolls out checkpoints of the run on the main process, while the others wait."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.success: dict[str, float] = {}
        """Share of successes by evaluation name."""
        self.invalid: dict[str, InvalidAnswers] = {}
        """Answers that were no chunk of actions, by evaluation name; only of policies that write tokens."""

    def require_start(self) -> None:
        """Raise TrainingError if a resumed run has no checkpoint of step 0 to evaluate."""
        run = self.context
        if not run.manager.path(0).is_dir():
            raise TrainingError(
                f"{run.out}: the run began with eval.before = false, so it has no checkpoint of step 0; "
                "resume it with eval.before = false, or start a new run with --out"
            )

    def before_training(self) -> None:
        """Save the policy before the first step, so that a checkpoint is evaluated, and evaluate it."""
        run = self.context
        if not run.manager.path(0).is_dir():
            barrier()  # every process has checked that the folder is missing
            if run.main:
                plan = run.experiment.plan
                run.manager.save(0, lambda folder: run.write_policy(folder, plan, None))
            barrier()
        self.evaluate("before", 0)

    def due(self, step: int) -> bool:
        """Tell whether the recipe asks for an evaluation at `step`, during training."""
        every, last = self.context.recipe.eval.every, self.context.recipe.train.steps
        return bool(every) and step % every == 0 and 0 < step < last

    def during_training(self, step: int) -> None:
        """Evaluate the checkpoint of `step`; its memory is not measured."""
        self.context.meter.pause()
        self.evaluate(f"step_{step:06d}", step, trials=self.context.recipe.eval.every_trials)
        self.context.meter.start()
        self.context.callbacks.phase("training")

    def after_training(self, step: int) -> None:
        """Evaluate the last checkpoint as the recipe asks."""
        recipe = self.context.recipe.eval
        if recipe.protocol and recipe.after:
            self.evaluate("after", step)
        if recipe.controls:
            self.evaluate("wrong_instruction", step, wrong_instruction=True)
        elif recipe.wrong_instruction:
            log.warning(
                "eval.wrong_instruction is left out: it is the control of the evaluation after training, and "
                "eval.after is false"
            )

    def evaluate(
        self, name: str, step: int, *, trials: int | None = None, wrong_instruction: bool = False
    ) -> None:
        """Roll out the checkpoint of `step`; episodes that were finished earlier are not repeated."""
        run = self.context
        run.callbacks.phase(f"evaluation {name}")
        if run.main:
            recipe = run.recipe.eval
            out = run.out / "eval" / name
            width = rollout.policy_width(
                recipe.protocol, out, trials=trials, wrong_instruction=wrong_instruction
            )
            result = rollout.evaluate(
                load_actor(
                    run.manager.path(step),
                    width=width,
                    device=str(run.device),
                    embodiment=run.experiment.evaluated,
                ),
                recipe.protocol,
                out,
                workers=recipe.workers,
                trials=trials,
                videos=recipe.videos,
                resume=True,
                wrong_instruction=wrong_instruction,
                progress=run.callbacks.episode,
            )
            self.success[name] = result.rate
            if (invalid := result.invalid_answers) is not None:
                self.invalid[name] = invalid
            if run.metrics.log_once(step, {f"eval/{name}/success": result.rate}):
                log_evaluation(run.accelerator, name, step, result)
        barrier()
