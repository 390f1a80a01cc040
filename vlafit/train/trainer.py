"""Train a policy, and do what is due between steps: stages, metrics, validation, checkpoints, evaluations."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import final

import torch

from vlafit import parent
from vlafit.nn.batch import Batch
from vlafit.train import checkpointer, dataloader, saved_weights, stages
from vlafit.train.checkpointer import Progress
from vlafit.train.context import RunContext
from vlafit.train.distributed import barrier, from_main, gathered, sum_over_processes
from vlafit.train.evaluator import Evaluator
from vlafit.train.flops import FlopCounter
from vlafit.train.instruments import Instruments, known_peak
from vlafit.train.loop import Keys, NotFinite, StepResult, train
from vlafit.train.train_state import TrainState
from vlafit.train.validate import validate

log = logging.getLogger(__name__)


class RunStatus(Enum):
    """How far training is."""

    RUNNING = "running"
    STOPPED = "stopped"
    """SIGINT or SIGTERM stopped it before its last step; it can be resumed."""
    FINISHED = "finished"
    FINISHED_ON_SIGNAL = "finished on signal"
    """A signal was received in the last step: the run is finished, but start no other."""

    @property
    def finished(self) -> bool:
        return self in (RunStatus.FINISHED, RunStatus.FINISHED_ON_SIGNAL)

    @property
    def signalled(self) -> bool:
        """Whether SIGINT or SIGTERM was received."""
        return self in (RunStatus.STOPPED, RunStatus.FINISHED_ON_SIGNAL)


@dataclass
class TrainerState:
    """Everything about a run in progress that changes from step to step, beside weights and optimiser."""

    progress: Progress = field(default_factory=Progress)
    """State that is saved with every checkpoint."""
    status: RunStatus = RunStatus.RUNNING
    spent: float = 0.0
    """Share of `train.max_seconds` that was used before the last step."""
    zero_s: float = 0.0
    """`time.perf_counter()` at which the training time was 0; validation and evaluations move it on."""
    validation: Mapping[str, Sequence[tuple[Keys, Batch]]] = field(default_factory=dict)
    """Batches of each validation set; "" are the held-out episodes."""
    memory: dict[str, object] | None = None
    """Peak memory; None if nothing was trained."""


@final
class Trainer:
    """Trains the experiment of a run. Every process has one; only the main process writes."""

    def __init__(self, context: RunContext, evaluator: Evaluator, resumed: Path | None) -> None:
        """Start at step 0, or where the checkpoint `resumed` was written. Writes nothing.

        Raises TrainingError if that checkpoint is damaged, of other data, or of another strategy.
        """
        self.context, self.evaluator = context, evaluator
        self.state = TrainerState()
        experiment = context.experiment
        saved = None
        if resumed is not None:
            saved = checkpointer.read(resumed, experiment.data.fingerprint)
            self.state.progress = saved.progress
        self.train_state = TrainState(
            experiment.policy, experiment.plan, context.recipe, context.device, self.state.progress.stage
        )
        self.instruments = Instruments(
            context.recipe.train.samples,
            known_peak(context.recipe.train, context.device),
            self._flops_of_stage(),
        )
        if saved is not None:
            checkpointer.restore(saved, self.train_state)
        self._resumed = saved is not None

    def train(self) -> RunStatus:
        """Train to the recipe's last step, or to its last second, or until a signal; return the status.

        Raises NotFinite naming the last good checkpoint.
        """
        context, state = self.context, self.state
        if self._resumed:
            self._mark_best()  # the killed run may not have done so
            self._prune()
        context.callbacks.phase("training")
        first = state.progress.step
        self._update_status(first, self._spent())
        if state.status.finished:
            return state.status
        context.meter.start()
        self._load_validation()
        if first == 0:
            self._validate(0)
        elif self.evaluator.due(first):
            self.evaluator.during_training(first)
        state.zero_s = time.perf_counter() - state.progress.seconds
        self._announce_stage()
        try:
            self._train_stages()
        except NotFinite as error:
            raise NotFinite(f"{error}. {self._how_to_continue()}") from error
        context.meter.pause()
        if context.main and self.train_state.cache is not None:
            log.info("%s", self.train_state.cache.sentence)
        packer = self.train_state.packer
        if context.main and packer is not None and packer.sentence:
            log.info("%s", packer.sentence)
        optimizer, ema = self.train_state.optimizer, self.train_state.ema
        state.memory = context.meter.facts(context.experiment.policy, optimizer, ema)
        return state.status

    def _train_stages(self) -> None:
        recipe, state = self.context.recipe, self.state
        rank, world = self._place
        batches = dataloader.training_batches(
            self.context.experiment, first_step=state.progress.step, rank=rank, world=world
        )
        with _signals() as signalled:
            while state.status is RunStatus.RUNNING:
                self._change_stage()
                train(
                    self.train_state,
                    batches,
                    first_step=state.progress.step,
                    recipe=recipe.train,
                    optim=recipe.optim,
                    world=world,
                    wants_stop=signalled,
                    spent=self._spent,
                    after_step=self._after_step,
                )
            if state.status is RunStatus.FINISHED and signalled():
                state.status = RunStatus.FINISHED_ON_SIGNAL

    @property
    def _place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        return self.context.accelerator.process_index, self.context.accelerator.num_processes

    def _load_validation(self) -> None:
        rank, world = self._place
        experiment = self.context.experiment
        self.state.validation = {
            "": dataloader.validation_batches(experiment, rank=rank, world=world),
            **dataloader.named_validation_batches(experiment, rank=rank, world=world),
        }

    def _spent(self) -> float:
        """Return the share of `train.max_seconds` that is used after one more step; 0 without a limit."""
        limit, progress = self.context.recipe.train.max_seconds, self.state.progress
        return progress.seconds * (1 + 1 / progress.step) / limit if limit and progress.step else 0.0

    def _update_status(self, step: int, spent: float, *, stop: bool = False) -> None:
        """Set the status after `step`, before which the share `spent` of the time limit was used."""
        self.state.spent = spent
        if step >= self.context.recipe.train.steps or spent >= 1:
            self.state.status = RunStatus.FINISHED
        elif stop:
            self.state.status = RunStatus.STOPPED

    def _after_step(self, result: StepResult) -> bool:
        """Do what is due after a step; return whether the next one belongs to the same stage."""
        recipe, state, step = self.context.recipe.train, self.state, result.step
        self.instruments.add(result)
        seconds = time.perf_counter() - state.zero_s
        state.progress = replace(state.progress, step=step, seconds=seconds)
        self._update_status(step, result.spent, stop=result.stop)
        last = state.status is not RunStatus.RUNNING
        values: dict[str, float] = {}
        if step % recipe.log_every == 0 or last:
            values = self._log(result)
        if state.status.finished or (recipe.validate_every and step % recipe.validate_every == 0):
            values |= self._validate(step)
        is_best = recipe.keep_best and state.progress.best_step == step
        save_due = bool(recipe.save_every) and step % recipe.save_every == 0
        if last or is_best or save_due or self.evaluator.due(step):
            self._save(step)
        self.context.callbacks.step(result, recipe.steps, values)
        if self.evaluator.due(step) and not last:
            began = time.perf_counter()
            self.evaluator.during_training(step)
            state.zero_s += time.perf_counter() - began  # training time excludes rollouts
        return self._stage_due() == state.progress.stage.number

    # -------------------------------------------------------------------------------------------- stages

    def _stage_due(self) -> int:
        """Return the number of the stage that the next step belongs to."""
        strategy, progress = self.train_state.plan.strategy, self.state.progress
        steps = self.context.recipe.train.steps
        return stages.due(strategy.stages, steps, progress.step, progress.stage, self.state.spent)

    def _change_stage(self) -> None:
        """Enter the stage of the next step, if it is not the stage of the last step."""
        state = self.state
        number, before, step = self._stage_due(), state.progress.stage.number, state.progress.step
        if number == before:
            return
        for skipped in range(before + 1, number):
            name = stages.title(self.train_state.plan.at(skipped))
            log.warning("step %d: %s is skipped, because the next stage begins now", step, name)
        place = stages.Place(number, began=step, spent=state.spent)
        state.progress = replace(state.progress, stage=place)
        self.train_state.change(place)
        self.instruments.use(self._flops_of_stage())
        self._announce_stage()

    def _flops_of_stage(self) -> FlopCounter:
        context = self.context
        cache = self.train_state.cache
        kept = None if cache is None else cache.cacheable.kind
        draws = context.recipe.train.draws
        return FlopCounter(context.experiment.policy, self.train_state.plan, draws, kept=kept)

    def _announce_stage(self) -> None:
        """Log and show the current stage, if there are several."""
        context, plan, began = self.context, self.train_state.plan, self.state.progress.stage.began
        if len(plan.strategy.stages) == 1:
            return
        log.info("step %d: %s, %d trainable parameters", began, stages.title(plan), plan.trainable_parameters)
        seconds = round(time.perf_counter() - self.state.zero_s, 3)
        context.metrics.log_once(began, {"time_s": seconds, "train/stage": plan.stage + 1})
        if plan.stage != context.experiment.plan.stage:  # that stage's table was shown at the start
            context.callbacks.stage(plan, began)

    # ---------------------------------------------------------------------------- metrics and validation

    def _log(self, result: StepResult) -> dict[str, float]:
        policy, train_state = self.context.experiment.policy, self.train_state
        values = {
            "time_s": round(self.state.progress.seconds, 3),
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
        }
        began = time.perf_counter()
        values |= self.instruments.values()
        self.state.zero_s += time.perf_counter() - began  # training time excludes counting FLOPs
        if self.context.main:
            values |= self.context.meter.values(policy, train_state.optimizer, train_state.ema)
        values |= self.train_state.learning_rates()
        values |= {f"train/loss_{term}": mean for term, mean in result.terms.items()}
        if self.train_state.ranks is not None and (ranks := self.train_state.ranks.ranks().values()):
            values |= {"train/rank/mean": sum(ranks) / len(ranks)}
            values |= {"train/rank/min": min(ranks), "train/rank/max": max(ranks)}
        self.context.metrics.log(result.step, values)
        return values

    def _validate(self, step: int) -> dict[str, float]:
        """Validate the weights that are evaluated and exported: the EMA, if there is one."""
        context, state = self.context, self.state
        began = time.perf_counter()
        values: dict[str, float] = {}
        ema = self.train_state.ema
        with nullcontext() if ema is None else ema.applied():
            for name, batches in state.validation.items():
                if batches:
                    policy, recipe = context.experiment.policy, context.recipe.train
                    codecs, cache = context.experiment.codecs, self.train_state.cache
                    values |= validate(policy, batches, recipe, context.device, codecs, name, cache)
        if step and "validation/loss" in values:
            loss, progress = from_main(values["validation/loss"], context.device), state.progress
            state.progress = replace(progress, stage=progress.stage.validated(loss))
            if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
                state.progress = replace(state.progress, best_loss=loss, best_step=step)
        if values:
            context.metrics.log(step, {"time_s": round(state.progress.seconds, 3), **values})
        if step:
            state.zero_s += time.perf_counter() - began  # training time excludes validation
        return values

    # --------------------------------------------------------------------------------------- checkpoints

    def _save(self, step: int) -> None:
        """Write the checkpoint of `step`; every process takes part in gathering it."""
        context, progress, train_state = self.context, self.state.progress, self.train_state
        policy = context.experiment.policy
        tensors = checkpointer.collect(train_state, keep=context.main)
        averaged = train_state.ema.updates if train_state.ema is not None else {}
        live = saved_weights.to_save(policy, context.experiment.saved_on(train_state.plan)[1])
        weights = gathered({n: p for n, p in live.items() if n not in averaged}, keep=context.main)
        weights |= checkpointer.averages_of(tensors)
        if context.recipe.train.precision == "bf16" and context.main:
            weights = saved_weights.rounded(policy, weights, train_state.plan.trainable)
        broken = [name for name, tensor in {**tensors, **weights}.items() if not torch.isfinite(tensor).all()]
        if sum_over_processes(torch.tensor(float(len(broken)), device=context.device)) > 0:
            raise NotFinite(f"step {step}: weights or optimiser states are not finite: {broken[:3]}")

        def fill(folder: Path) -> None:
            context.write_policy(folder, train_state.plan, weights)
            checkpointer.write(folder, tensors, progress, context.experiment.data.fingerprint)

        if context.main:
            folder = context.manager.save(step, fill)
            log.info("%s: %s", folder.name, context.describe_saved(folder, train_state.plan))
        self._mark_best()
        self._prune()
        barrier()

    def _prune(self) -> None:
        recipe = self.context.recipe
        if self.context.main:
            best = self.state.progress.best_step if recipe.train.keep_best else None
            self.context.manager.prune(best, always={0} if recipe.eval.before else set())

    def _mark_best(self) -> None:
        step, loss = self.state.progress.best_step, self.state.progress.best_loss
        if (
            self.context.main
            and self.context.recipe.train.keep_best
            and step is not None
            and loss is not None
        ):
            self.context.manager.mark_best(step, loss)

    def _how_to_continue(self) -> str:
        last = self.context.manager.resumable()
        if last is None:
            return "No checkpoint was written yet: start a new run with --out and a lower optim.lr"
        return (
            f"{last} is the last good checkpoint: fine-tune it with --policy.checkpoint {last}, --out and a "
            "lower optim.lr"
        )


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Within this block SIGINT, SIGTERM and SIGHUP ask for a stop after the current step.

    A second SIGINT interrupts at once.
    """
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield lambda: False
        return
    old = {number: signal.signal(number, ask) for number in parent.ending_signals()}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
