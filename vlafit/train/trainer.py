"""A run in progress: training, and what happens between steps: metrics, validation, saving, rollouts."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vlafit import checkpoints, config, rollout
from vlafit.actor import load_actor
from vlafit.errors import TrainingError
from vlafit.train import checkpointer as state
from vlafit.train import dataloader as feed
from vlafit.train import stages
from vlafit.train.callbacks import Observer
from vlafit.train.checkpoint_folders import Shelf
from vlafit.train.distributed import barrier, from_main, gathered, sum_over_processes
from vlafit.train.experiment import Experiment
from vlafit.train.loop import NotFinite, StepResult, train
from vlafit.train.memory import MemoryMeter
from vlafit.train.metrics import Metrics
from vlafit.train.train_state import Learner
from vlafit.train.validate import validate
from vlafit.tuning import Plan
from vlafit.tuning.quantise import quantised_names

log = logging.getLogger(__name__)


class Job:
    """The experiment, its checkpoints and its metrics. Every process has one; the main process writes."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        accelerator: Accelerator,
        shelf: Shelf,
        observer: Observer,
        meter: MemoryMeter,
    ) -> None:
        self.experiment, self.recipe, self.out = experiment, experiment.recipe, out
        self.accelerator, self.shelf, self.observer = accelerator, shelf, observer
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.metrics = Metrics(out, accelerator)
        self.progress = state.Progress()
        self.success: dict[str, float] = {}
        self.asked_to_stop = False
        self.meter = meter
        self.memory: dict[str, object] | None = None  # None: nothing was trained

    # ------------------------------------------------------------------------------------------- rollouts

    def save_start(self, resumed: bool) -> None:
        """Save the policy as it is before the first step, so that what is evaluated is a checkpoint."""
        if self.shelf.path(0).is_dir():
            return
        if resumed:
            raise TrainingError(
                f"{self.out}: eval.before was off when the run began, and its start is gone; leave it off, "
                "or start anew with --out"
            )
        barrier()  # all have looked
        if self.main:
            self.shelf.save(0, lambda folder: self._write(folder, self.experiment.plan, None))
        barrier()

    def evaluate(
        self, name: str, step: int, *, trials: int | None = None, wrong_instruction: bool = False
    ) -> None:
        """Roll out the checkpoint of `step`, on the main process; what was played before is kept."""
        self.observer.phase(f"evaluation {name}")
        if self.main:
            spec = self.recipe.eval
            result = rollout.evaluate(
                load_actor(self.shelf.path(step), device=str(self.device)),
                spec.protocol,
                self.out / "eval" / name,
                workers=spec.workers,
                trials=trials,
                videos=spec.videos,
                resume=True,
                wrong_instruction=wrong_instruction,
                progress=self.observer.episode,
            )
            self.success[name] = result.rate
            self.metrics.log_once(step, {f"eval/{name}/success": result.rate})
        barrier()

    def _evaluate_now(self, step: int) -> bool:
        """Whether the recipe asks for rollouts at `step`, in the midst of training."""
        every = self.recipe.eval.every
        return bool(every) and step % every == 0 and 0 < step < self.recipe.train.steps

    def _evaluate_step(self, step: int) -> None:
        self.meter.pause()
        self.evaluate(f"step_{step:06d}", step, trials=self.recipe.eval.every_trials)
        self.meter.start()
        self.observer.phase("training")

    # ------------------------------------------------------------------------------------------- training

    def train(self, resumed: Path | None) -> bool:
        """Train to the recipe's last step or second; return False when a signal stopped it before.

        Raises NotFinite, saying which checkpoint is the last good one.
        """
        recipe, experiment = self.recipe.train, self.experiment
        self.observer.phase("training")
        saved = None
        if resumed is not None:
            saved = state.read(resumed, experiment.data.fingerprint)
            self.progress = saved.progress
        place = self.progress.stage
        self.learner = Learner(experiment.policy, experiment.plan, self.recipe, self.device, place)
        if saved is not None:
            state.restore(saved, self.learner)
            self._point_best()  # the killed run may not have come so far
        first = self.progress.step
        self.gone = self._spent()
        if self._ended(first, self.gone):
            return True
        self.meter.start()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.validation = {"": feed.validation_batches(experiment, rank=rank, world=world)}
        self.validation |= feed.named_validation_batches(experiment, rank=rank, world=world)
        if first == 0:
            self._validate(0)
        elif self._evaluate_now(first):
            self._evaluate_step(first)
        self.clock = time.perf_counter() - self.progress.seconds
        self._tell_stage()
        batches = feed.training_batches(experiment, first_step=first, rank=rank, world=world)
        self.stopped = False
        try:
            with _signals() as wants_stop:
                while not self.over and not self.stopped:
                    self._change_stage()
                    train(
                        self.learner,
                        batches,
                        first_step=self.progress.step,
                        recipe=recipe,
                        optim=self.recipe.optim,
                        world=world,
                        wants_stop=wants_stop,
                        spent=self._spent,
                        after_step=self._after_step,
                    )
                self.asked_to_stop = wants_stop()  # too late for this run, perhaps, but not for what follows
        except NotFinite as error:
            raise NotFinite(f"{error}. {self._way_out()}") from error
        self.meter.pause()
        self.memory = self.meter.facts(experiment.policy, self.learner.optimizer, self.learner.ema)
        return self.over

    def _spent(self) -> float:
        """Return the share of `train.max_seconds` that is gone after one more step; 0 without a limit."""
        limit, now = self.recipe.train.max_seconds, self.progress
        return now.seconds * (1 + 1 / now.step) / limit if limit and now.step else 0.0

    def _ended(self, step: int, spent: float) -> bool:
        """Whether training is over after `step`, before which so much of its time was gone."""
        self.over = step >= self.recipe.train.steps or spent >= 1
        return self.over

    def _due(self) -> int:
        """Return the number of the stage that the next step belongs to."""
        strategy, progress = self.learner.plan.strategy, self.progress
        return stages.due(strategy.stages, self.recipe.train.steps, progress.step, progress.stage, self.gone)

    def _change_stage(self) -> None:
        """Enter the stage that the next step belongs to, where that is another than the last step's."""
        number, before, step = self._due(), self.progress.stage.number, self.progress.step
        if number == before:
            return
        for passed in range(before + 1, number):
            name = stages.title(self.learner.plan.at(passed))
            log.warning("step %d: %s is passed over, for the next one begins now", step, name)
        self.progress = replace(self.progress, stage=stages.Place(number, began=step, spent=self.gone))
        self.learner.change(self.progress.stage)
        self._tell_stage()

    def _tell_stage(self) -> None:
        """Log and show the stage that begins, or that a resumed run is in; of several alone."""
        plan, began = self.learner.plan, self.progress.stage.began
        if len(plan.strategy.stages) == 1:
            return
        log.info("step %d: %s, %d parameters learn", began, stages.title(plan), plan.trainable_parameters)
        seconds = round(time.perf_counter() - self.clock, 3)
        self.metrics.log_once(began, {"time_s": seconds, "train/stage": plan.stage + 1})
        if plan.stage != self.experiment.plan.stage:  # that table is shown from the start
            self.observer.stage(plan, began)

    def _way_out(self) -> str:
        last = self.shelf.resumable()
        if last is None:
            return "No checkpoint was written yet: start anew, with --out and a lower optim.lr"
        return (
            f"{last} is the last good checkpoint: train on from it with --policy.checkpoint {last}, --out "
            "and a lower optim.lr"
        )

    def _after_step(self, result: StepResult) -> bool:
        """Do what is due after a step; return whether the next one is of the same stage."""
        recipe, step = self.recipe.train, result.step
        self.progress = replace(self.progress, step=step, seconds=time.perf_counter() - self.clock)
        self.gone = result.spent
        over = self._ended(step, self.gone)
        last = over or result.stop
        values: dict[str, float] = {}
        if step % recipe.log_every == 0 or last:
            values = self._log(result)
        if over or (recipe.validate_every and step % recipe.validate_every == 0):
            values |= self._validate(step)
        best_now = recipe.keep_best and self.progress.best_step == step
        save_now = bool(recipe.save_every) and step % recipe.save_every == 0
        if last or best_now or save_now or self._evaluate_now(step):
            self._save(step)
        self.observer.step(result, recipe.steps, values)
        if self._evaluate_now(step) and not last:
            began = time.perf_counter()
            self._evaluate_step(step)
            self.clock += time.perf_counter() - began  # training time is without rollouts
        self.stopped = result.stop
        return self._due() == self.progress.stage.number

    def _log(self, result: StepResult) -> dict[str, float]:
        batch_size = self.recipe.train.batch_size
        values = {
            "time_s": round(self.progress.seconds, 3),
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/samples_per_s": batch_size / result.seconds,
            "train/data_share": result.data_seconds / result.seconds,
        }
        if self.learner.ranks is not None and (ranks := self.learner.ranks.ranks().values()):
            values |= {"train/rank/mean": sum(ranks) / len(ranks)}
            values |= {"train/rank/min": min(ranks), "train/rank/max": max(ranks)}
        if self.device.type == "cuda":
            values["train/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.metrics.log(result.step, values)
        return values

    def _validate(self, step: int) -> dict[str, float]:
        """Validate what is evaluated and exported: the moving average where there is one."""
        began = time.perf_counter()
        values: dict[str, float] = {}
        ema = self.learner.ema
        with nullcontext() if ema is None else ema.applied():
            for name, batches in self.validation.items():
                if batches:
                    values |= validate(self.experiment.policy, batches, self.recipe.train, self.device, name)
        if step and "validation/loss" in values:
            loss, progress = from_main(values["validation/loss"], self.device), self.progress
            self.progress = replace(progress, stage=progress.stage.validated(loss))
            if progress.best_loss is None or loss < progress.best_loss:
                self.progress = replace(self.progress, best_loss=loss, best_step=step)
        if values:
            self.metrics.log(step, {"time_s": round(self.progress.seconds, 3), **values})
        if step:
            self.clock += time.perf_counter() - began  # training time is without validation
        return values

    # --------------------------------------------------------------------------------------- checkpoints

    def _save(self, step: int) -> None:
        """Write the checkpoint of `step`; every process takes part in gathering it."""
        policy = self.experiment.policy
        average = self.learner.ema.average if self.learner.ema is not None else {}
        tensors = state.collect(self.learner, keep=self.main)
        rounded = {f"{layer}.weight" for layer in quantised_names(policy)}  # frozen, and never written
        live = {name: p for name, p in policy.named_parameters() if name not in rounded}
        weights = gathered({**live, **average}, keep=self.main)
        odd = [name for name, tensor in {**tensors, **weights}.items() if not torch.isfinite(tensor).all()]
        if sum_over_processes(torch.tensor(float(len(odd)), device=self.device)) > 0:
            raise NotFinite(f"step {step}: the weights or the optimiser's states are not finite: {odd[:3]}")

        def fill(folder: Path) -> None:
            self._write(folder, self.learner.plan, weights)
            state.write(folder, tensors, self.progress, self.experiment.data.fingerprint)

        if self.main:
            self.shelf.save(step, fill)
        self._point_best()
        if self.main:
            best = self.progress.best_step if self.recipe.train.keep_best else None
            self.shelf.prune(best, always={0} if self.recipe.eval.before else set())
        barrier()

    def _write(self, folder: Path, plan: Plan, weights: Mapping[str, Tensor] | None) -> None:
        """Write the policy's part of a checkpoint; `weights` replace its own."""
        base, changed = self.experiment.saved_on(plan)
        checkpoints.save(
            self.experiment.policy,
            folder,
            self.experiment.codec,
            plan=plan,
            recipe=config.dump(self.recipe),
            history=self.experiment.history,
            weights=weights,
            base=base,
            changed=changed,
        )

    def _point_best(self) -> None:
        step, loss = self.progress.best_step, self.progress.best_loss
        if self.main and self.recipe.train.keep_best and step is not None and loss is not None:
            self.shelf.point_best(step, loss)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Within this block SIGINT and SIGTERM ask for a stop after the current step.

    A second SIGINT interrupts at once.
    """
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield lambda: False
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
