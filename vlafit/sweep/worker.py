"""Run trials of a sweep in one worker: take a trial, train it, report its validation losses."""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlafit import checkpoints, config, files, shipped
from vlafit.compare.identity import digest, flat
from vlafit.compare.process import stopping
from vlafit.errors import ConfigError, VlafitError
from vlafit.nn.policy import Policy
from vlafit.recipe import Recipe
from vlafit.sweep.storage import Storage, Taken
from vlafit.sweep.study import Study, check, prepare
from vlafit.train import run as train
from vlafit.train.callbacks import Callbacks
from vlafit.train.data import Data, open_data
from vlafit.train.loop import StepResult
from vlafit.train.preflight import check as check_recipe
from vlafit.train.preflight import meta_policy, plan_of
from vlafit.tuning import Strategy

log = logging.getLogger(__name__)

LOSS = "validation/loss"
NOT_SHARED = ("name", "purpose", "train.threads", "train.trackers", "train.report", "train.keep",
              "train.save_every", "train.log_every", "data.workers", "data.validation_sets", "eval.protocol",
              "eval.before", "eval.after", "eval.every", "eval.every_trials", "eval.wrong_instruction",
              "eval.workers", "eval.videos")  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep: recipe, study and folder."""

    recipe: Recipe
    study: Study
    folder: Path

    def trial_recipe(self) -> Recipe:
        """Return the recipe of a trial: without evaluation, because trials are ranked by validation loss."""
        no_rollouts = replace(self.recipe.eval, protocol="", before=False, every=0, wrong_instruction=False)
        return replace(self.recipe, eval=no_rollouts)


def require_possible(sweep: Sweep, where: str) -> dict[str, Any]:
    """Return the sweep's identity as plain values; raise for names or values that cannot be searched.

    `where` names the study's file in errors.
    """
    recipe = sweep.recipe
    check_recipe(recipe, 1)
    if not recipe.data.validation:
        raise ConfigError(
            "data.validation is 0, but a sweep ranks trials by the loss on held-out episodes; set it above 0"
        )
    data = open_data(recipe.data, recipe.train.seed)
    check(sweep.study, recipe, where, _TrialCheck(data))
    base = recipe.policy.checkpoint
    searched = {name: asdict(dimension) for name, dimension in sweep.study.search.items()}
    strategy = config.load_toml(shipped.find("strategy", recipe.strategy), "strategy")
    return {
        "recipe": flat(asdict(recipe), (*NOT_SHARED, *searched)),
        "search": flat(searched, ()),
        "strategy": digest(strategy),
        "data": data.fingerprint,
        "base": checkpoints.digest(checkpoints.place(base).path) if base else "",
        "seed": sweep.study.seed,
    }


class _TrialCheck:
    """Checks on the meta device that a trial's recipe and strategy can train."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._policies: dict[str, Policy] = {}

    def __call__(self, recipe: Recipe, strategy: Strategy) -> None:
        """Raise a VlafitError for a trial that cannot train."""
        check_recipe(recipe, 1)
        key = config.dump(recipe.policy)
        if key not in self._policies:
            self._policies[key] = meta_policy(recipe, self._data)
        plan_of(recipe, strategy, self._policies[key], held_out=any(self._data.validation))


def run_trials(sweep: Sweep, tell: Callable[[str], None]) -> bool:
    """Run trials until the study has enough; return False if a signal stopped it before.

    `tell` receives one line for each ended trial. The error of a failed trial is recorded with it.
    """
    storage = Storage(sweep.folder, sweep.study, sweep.recipe.train.steps)
    with stopping(_interrupt):  # SIGTERM too: a trial that is asked to stop must not count as dead
        while (taken := storage.take(sweep.study.trials)) is not None:
            if not _run_trial(sweep, storage, taken, tell):
                return False
            gc.collect()
    return True


def _interrupt() -> None:
    raise KeyboardInterrupt


def _run_trial(sweep: Sweep, storage: Storage, taken: Taken, tell: Callable[[str], None]) -> bool:
    name = f"trial {taken.number}"
    out = taken.folder / "run"
    try:
        recipe = prepare(sweep.trial_recipe(), taken.values, taken.folder)
        watcher = _Watcher(storage, taken, out)
        summary = train(recipe, out, resume=True, command="", callbacks=watcher)
    except storage.optuna.TrialPruned as pruned:
        storage.pruned(taken)
        tell(f"{name}: pruned, {pruned}: {shown(taken.values)}")
        return True
    except KeyboardInterrupt:
        storage.interrupted(taken)
        return False
    except (
        VlafitError,
        RuntimeError,
        MemoryError,
    ) as error:  # RuntimeError: torch out of memory, for example
        storage.failed(taken, f"{type(error).__name__}: {error}")
        tell(f"{name}: FAILED: {error}: {shown(taken.values)}")
        return True
    if not summary.finished:
        storage.interrupted(taken)
        return False
    loss = last_loss(out)
    if loss is None:
        storage.failed(taken, "the last validation loss is not a number")
        tell(f"{name}: FAILED: the last validation loss is not a number: {shown(taken.values)}")
        return True
    storage.done(taken, loss)
    tell(f"{name}: validation {loss:.4g}: {shown(taken.values)}")
    return not summary.signalled


class _Watcher(Callbacks):
    """Reports each validation loss to the study, and stops the run if the pruner decides so."""

    def __init__(self, storage: Storage, taken: Taken, out: Path) -> None:
        self._storage, self._trial = storage, taken.trial
        self._reported: set[int] = set()
        for step, loss in losses(out):  # logged by a worker that started this run and died
            self._report(step, loss)

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """Report the validation loss of this step, if there is one."""
        if LOSS not in values or result.step == total:
            return
        self._report(result.step, values[LOSS])
        with self._storage.database():
            prune = self._trial.should_prune()
        if prune:
            raise self._storage.optuna.TrialPruned(f"validation {values[LOSS]:.4g} after step {result.step}")

    def _report(self, step: int, loss: float) -> None:
        if step and step not in self._reported:
            self._reported.add(step)
            with self._storage.database():
                self._trial.report(loss, step)


def losses(run: Path) -> list[tuple[int, float]]:
    """Return the (step, validation loss) pairs of a run folder in order."""
    return [
        (event["step"], event[LOSS])
        for event in files.read_json_lines(run / "metrics.jsonl")
        if event.get(LOSS) is not None
    ]


def last_loss(run: Path) -> float | None:
    """Return the last validation loss of a run folder; None if it was not a number."""
    events = [e for e in files.read_json_lines(run / "metrics.jsonl") if LOSS in e]
    return events[-1][LOSS] if events else None


def shown(values: Mapping[str, object]) -> str:
    """Return a trial's values as one line of text."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
