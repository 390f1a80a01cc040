"""One run, from recipe to report: set up, evaluate before, train, evaluate after, write the page.

Everything a run writes lies in its folder; a run that was stopped, or killed, goes on with `resume=True`.
"""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from vlafit import checkpoints, config, files, report, rollout
from vlafit.errors import TrainingError
from vlafit.recipe import Recipe
from vlafit.train import setup, state
from vlafit.train.loop import StepResult, train
from vlafit.train.metrics import Metrics
from vlafit.train.optim import Ema, build_optimizer
from vlafit.train.parallel import gathered, wrap
from vlafit.train.provenance import describe_machine
from vlafit.train.validate import validate

log = logging.getLogger(__name__)

# Fields that may differ between a run and its resumption: none of them changes a weight.
HARMLESS = ("name", "purpose", "eval", "train.log_every", "train.keep", "train.keep_best", "train.save_every",
            "train.validate_every", "train.validation_batches", "train.trackers", "data.workers")  # fmt: skip
ONE_DAY = timedelta(days=1)  # other processes wait this long while the main one evaluates


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    folder: Path
    steps: int
    finished: bool  # False when a signal stopped it
    success: dict[str, float]  # share of successes by evaluation name
    report: Path | None


class Observer:
    """What the command line shows of a run; this one shows nothing."""

    def setup(self, experiment: setup.Experiment) -> None:
        """All is made; training is about to begin."""

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """An optimiser step ended; `values` holds what was logged at it, if anything was."""

    def phase(self, name: str) -> None:
        """A new phase began."""

    def episode(self, done: int, total: int, record: object) -> None:
        """A rollout ended."""


def run(
    recipe: Recipe, out: Path, *, resume: bool = False, command: str = "", observer: Observer | None = None
) -> RunSummary:
    """Carry out `recipe` in the folder `out`. Every process of an `accelerate launch` calls this.

    Raises a VlafitError for whatever the user can mend; a run that had begun stays resumable.
    """
    observer = observer or Observer()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=launched > 1 and not torch.cuda.is_available(),  # else accelerate leaves CPU processes unjoined
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(out),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=ONE_DAY)],
    )
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    main = accelerator.is_main_process
    began = time.perf_counter()

    resumed = _open_folder(recipe, out, resume, main)
    state.barrier()
    observer.phase("loading")
    experiment = setup.build(recipe, accelerator.device)
    run_facts = {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed.name if resumed else None,
        "load_report": experiment.load_report,
        "processes": accelerator.num_processes,
        **describe_machine(accelerator.device),
    }
    if main:
        files.write_atomic(out / "plan.json", experiment.plan.to_json())
        files.write_atomic(out / "run.json", json.dumps(run_facts, indent=2) + "\n")
        accelerator.init_trackers("tensorboard", config={"recipe": config.dump(recipe)})
    observer.setup(experiment)

    job = _Job(recipe, out, experiment, accelerator, observer)
    if recipe.eval.before and recipe.eval.protocol:
        job.save_start()
        job.evaluate("before", 0)
    finished = job.train(resumed)
    if finished and recipe.eval.protocol and recipe.eval.after:
        job.evaluate("after", recipe.train.steps)
        if recipe.eval.wrong_instruction:
            job.evaluate("wrong_instruction", recipe.train.steps, wrong_instruction=True)
    page = None
    if main:
        run_facts |= {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": finished,
            "seconds": round(time.perf_counter() - began, 1),
            "train_seconds": round(job.progress.seconds, 1),
            "steps": job.progress.step,
        }
        files.write_atomic(out / "run.json", json.dumps(run_facts, indent=2) + "\n")
        observer.phase("report")
        page = report.build(out)
    accelerator.end_training()
    return RunSummary(out, job.progress.step, finished, job.success, page)


def _open_folder(recipe: Recipe, out: Path, resume: bool, main: bool) -> Path | None:
    """Make the run folder, or check that it holds the same run; return the checkpoint to go on from."""
    kept = out / "recipe.toml"
    if kept.is_file():
        if not resume:
            raise TrainingError(
                f"{out} holds a run already; add --resume to go on with it, or choose another folder with --out"
            )
        before = config.read(Recipe, kept, "recipe")
        changed = _changes(before, recipe)
        if changed:
            raise TrainingError(
                f"{out}: cannot resume with another recipe; changed: {'; '.join(changed)}. Start anew with --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty and holds no run; choose another folder with --out")
    state.barrier()  # all have looked before the main process writes
    if main:
        files.require_writable(out)
        files.write_atomic(kept, config.dump(recipe))
    return state.Shelf(out, 1).resumable() if resume else None


def _changes(before: Recipe, now: Recipe) -> list[str]:
    """Name the fields of two recipes that differ and would change the weights."""

    def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for item in dataclasses.fields(value):
                yield from flat(getattr(value, item.name), f"{name}.{item.name}".lstrip("."))
        else:
            yield name, value

    harmless = tuple(HARMLESS)
    pairs = zip(flat(before), flat(now), strict=True)
    return [
        f"{name} was {a!r}, is {b!r}"
        for (name, a), (_, b) in pairs
        if a != b and not any(name == h or name.startswith(h + ".") for h in harmless)
    ]


class _Job:
    """A run in progress: the experiment, its shelf of checkpoints and its metrics."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        experiment: setup.Experiment,
        accelerator: Accelerator,
        observer: Observer,
    ) -> None:
        self.recipe, self.out, self.experiment = recipe, out, experiment
        self.accelerator, self.observer = accelerator, observer
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.shelf = state.Shelf(out, recipe.train.keep)
        self.metrics = Metrics(out, accelerator)
        self.progress = state.Progress()
        self.success: dict[str, float] = {}
        self._kept_for_eval: set[int] = set()

    def save_start(self) -> None:
        """Save the policy as it is before the first step, so that what is evaluated is a checkpoint."""
        self._kept_for_eval.add(0)
        if self.main and not self.shelf.path(0).exists():
            policy, codec = self.experiment.policy, self.experiment.codec
            self.shelf.save(
                0, lambda folder: checkpoints.save(folder, policy, codec, plan=self.experiment.plan)
            )
        state.barrier()

    def evaluate(
        self, name: str, step: int, *, trials: int | None = None, wrong_instruction: bool = False
    ) -> None:
        """Roll out the checkpoint of `step`, on the main process; the others wait."""
        self.observer.phase(f"evaluation {name}")
        if self.main:
            spec = self.recipe.eval
            result = rollout.evaluate_checkpoint(
                self.shelf.path(step),
                spec.protocol,
                self.out / "eval" / name,
                workers=spec.workers,
                trials=trials,
                videos=spec.videos,
                resume=True,
                wrong_instruction=wrong_instruction,
                training_seeds=self.experiment_seeds(),
                progress=self.observer.episode,
            )
            self.success[name] = result.rate
            self.metrics.log(step, {f"eval/{name}/success": result.rate})
        state.barrier()

    def experiment_seeds(self) -> dict[str, set[int]]:
        """Return the recorded seeds of each task, which no evaluation may start from."""
        seeds: dict[str, set[int]] = {}
        for store in self.experiment.data.stores:
            for episode in store.episodes:
                if episode.seed is not None:
                    seeds.setdefault(episode.task, set()).add(episode.seed)
        return seeds

    def train(self, resumed: Path | None) -> bool:
        """Train to the recipe's last step; return False when a signal stopped it before."""
        recipe, experiment = self.recipe, self.experiment
        self.observer.phase("training")
        model = wrap(experiment.policy, recipe.train.sharding, self.device)
        optimizer = build_optimizer(experiment.policy, experiment.plan, recipe.optim)
        self.ema = Ema(experiment.policy, recipe.optim.ema) if recipe.optim.ema else None
        self.optimizer = optimizer
        if resumed is not None:
            self.progress = state.restore(resumed, experiment.policy, optimizer, self.ema)
            self.metrics.rewind(self.progress.step)
        first = self.progress.step
        if first >= recipe.train.steps:
            return True
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.validation = setup.validation_batches(experiment, rank=rank, world=world)
        if first == 0:
            self._validate(0)
        self.clock, self.seconds_before = time.perf_counter(), self.progress.seconds
        stopped = False

        with _signals() as wants_stop:

            def after_step(result: StepResult) -> None:
                nonlocal stopped
                stopped = result.stop and result.step < recipe.train.steps
                self._after_step(result)

            train(
                model,
                optimizer,
                self.ema,
                setup.training_batches(experiment, first_step=first, rank=rank, world=world),
                first_step=first,
                recipe=recipe.train,
                optim=recipe.optim,
                device=self.device,
                world=world,
                wants_stop=wants_stop,
                after_step=after_step,
            )
        return not stopped

    def _after_step(self, result: StepResult) -> None:
        recipe, step = self.recipe.train, result.step
        self.progress = replace(
            self.progress, step=step, seconds=self.seconds_before + time.perf_counter() - self.clock
        )
        last = step == recipe.steps or result.stop
        values: dict[str, float] = {}
        if step % recipe.log_every == 0 or last:
            values = {
                "time_s": round(self.progress.seconds, 3),
                "train/loss": result.loss,
                "train/lr": result.lr,
                "train/grad_norm": result.grad_norm,
                "train/samples_per_s": recipe.batch_size / result.seconds,
                "train/data_share": result.data_seconds / result.seconds,
            }
            if self.device.type == "cuda":
                values["train/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            self.metrics.log(step, values)
        if step == recipe.steps or (recipe.validate_every and step % recipe.validate_every == 0):
            values |= self._validate(step)
        rolls = self.recipe.eval.every if self.recipe.eval.protocol else 0
        roll_now = bool(rolls) and step % rolls == 0 and step < recipe.steps
        best_now = recipe.keep_best and self.progress.best_step == step
        if last or roll_now or best_now or (recipe.save_every and step % recipe.save_every == 0):
            self._save(step)
        if roll_now:
            self.evaluate(f"step_{step:06d}", step, trials=self.recipe.eval.every_trials)
        self.observer.step(result, recipe.steps, values)

    def _validate(self, step: int) -> dict[str, float]:
        if not self.validation:
            return {}
        policy = self.experiment.policy
        if self.ema is None:
            values = validate(policy, self.validation, self.recipe.train, self.device)
        else:
            with self.ema.applied():
                values = validate(policy, self.validation, self.recipe.train, self.device)
        loss = values["validation/loss"]
        if step and (self.progress.best_loss is None or loss < self.progress.best_loss):
            self.progress = replace(self.progress, best_loss=loss, best_step=step)
        self.metrics.log(step, {"time_s": round(self.progress.seconds, 3), **values})
        return values

    def _save(self, step: int) -> None:
        """Write the checkpoint of `step`; every process takes part in gathering it."""
        policy, codec, plan = self.experiment.policy, self.experiment.codec, self.experiment.plan
        tensors = state.collect(policy, self.optimizer, self.ema)
        if self.ema is None:
            weights = gathered(dict(policy.named_parameters()))
        else:
            with self.ema.applied():
                weights = {
                    name: value.clone() for name, value in gathered(dict(policy.named_parameters())).items()
                }

        def fill(folder: Path) -> None:
            checkpoints.save(
                folder, policy, codec, plan=plan, recipe=config.dump(self.recipe), weights=weights
            )
            state.write(folder, tensors, self.progress, self.ema)

        if self.main:
            self.shelf.save(step, fill)
            if self.progress.best_step == step and self.progress.best_loss is not None:
                self.shelf.point_best(step, self.progress.best_loss)
            self.shelf.prune(self._kept_for_eval)
        state.barrier()


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Within this block SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT interrupts."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
