"""One worker of a sweep: take a trial, train it, report its validation losses, tell what came out."""

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
NOT_SHARED = ("name", "purpose", "train.threads", "train.trackers", "train.keep", "train.save_every",
              "train.log_every", "data.workers", "data.validation_sets", "eval.protocol", "eval.before",
              "eval.after", "eval.every", "eval.every_trials", "eval.wrong_instruction", "eval.workers",
              "eval.videos")  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep: the recipe, what is searched, and its folder."""

    recipe: Recipe
    study: Study
    folder: Path

    def trial_recipe(self) -> Recipe:
        """Return the recipe that trials vary: without rollouts, for they are judged by validation loss."""
        quiet = replace(self.recipe.eval, protocol="", before=False, every=0, wrong_instruction=False)
        return replace(self.recipe, eval=quiet)


def require_possible(sweep: Sweep, where: str) -> dict[str, Any]:
    """Return what the sweep is, as plain values; raise for whatever could not be searched.

    `where` names the study's file in errors.
    """
    recipe = sweep.recipe
    check_recipe(recipe, 1)
    if not recipe.data.validation:
        raise ConfigError(
            "data.validation is 0: a sweep goes by the loss on held-out episodes; hold some out"
        )
    data = open_data(recipe.data, recipe.train.seed)
    check(sweep.study, recipe, where, _Trials(data))
    base = recipe.policy.checkpoint
    searched = {name: asdict(one) for name, one in sweep.study.search.items()}
    strategy = config.load_toml(shipped.find("strategy", recipe.strategy), "strategy")
    return {
        "recipe": flat(asdict(recipe), (*NOT_SHARED, *searched)),
        "search": flat(searched, ()),
        "strategy": digest(strategy),
        "data": data.fingerprint,
        "base": checkpoints.digest(checkpoints.place(base).path) if base else "",
        "seed": sweep.study.seed,
    }


class _Trials:
    """Tells whether a trial's recipe and strategy could train, on the meta device."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._policies: dict[str, Policy] = {}

    def __call__(self, recipe: Recipe, strategy: Strategy) -> None:
        """Raise a VlafitError for what could not."""
        check_recipe(recipe, 1)
        key = config.dump(recipe.policy)
        if key not in self._policies:
            self._policies[key] = meta_policy(recipe, self._data)
        plan_of(recipe, strategy, self._policies[key], held_out=any(self._data.validation))


def work(sweep: Sweep, tell: Callable[[str], None]) -> bool:
    """Run trials until the study has as many as it wants; False when a signal stopped it before.

    `tell` is given a line for each trial that ended. Whatever breaks a trial is recorded with it.
    """
    storage = Storage(sweep.folder, sweep.study, sweep.recipe.train.steps)
    with stopping(_interrupt):  # SIGTERM, too: a trial that is told to stop has not died
        while (taken := storage.take(sweep.study.trials)) is not None:
            if not _carry_out(sweep, storage, taken, tell):
                return False
            gc.collect()
    return True


def _interrupt() -> None:
    raise KeyboardInterrupt


def _carry_out(sweep: Sweep, storage: Storage, taken: Taken, tell: Callable[[str], None]) -> bool:
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
    except (VlafitError, RuntimeError, MemoryError) as error:  # RuntimeError: torch's, out of memory for one
        storage.failed(taken, f"{type(error).__name__}: {error}")
        tell(f"{name}: BROKE: {error}: {shown(taken.values)}")
        return True
    if not summary.finished:
        storage.interrupted(taken)
        return False
    loss = last_loss(out)
    if loss is None:
        storage.failed(taken, "the last validation loss is not a number")
        tell(f"{name}: BROKE: the last validation loss is not a number: {shown(taken.values)}")
        return True
    storage.done(taken, loss)
    tell(f"{name}: validation {loss:.4g}: {shown(taken.values)}")
    return not summary.signalled


class _Watcher(Callbacks):
    """Reports each validation loss to the study, and ends the run when the pruner says so."""

    def __init__(self, storage: Storage, taken: Taken, out: Path) -> None:
        self._storage, self._trial = storage, taken.trial
        self._reported: set[int] = set()
        for step, loss in losses(out):  # of the worker that began this run and died
            self._report(step, loss)

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        """Report what was validated at this step."""
        if LOSS not in values or result.step == total:
            return
        self._report(result.step, values[LOSS])
        if self._trial.should_prune():
            raise self._storage.optuna.TrialPruned(f"validation {values[LOSS]:.4g} after step {result.step}")

    def _report(self, step: int, loss: float) -> None:
        if step and step not in self._reported:
            self._reported.add(step)
            self._trial.report(loss, step)


def losses(run: Path) -> list[tuple[int, float]]:
    """Return (step, validation loss) of a run folder, in order."""
    return [
        (event["step"], event[LOSS])
        for event in files.read_json_lines(run / "metrics.jsonl")
        if event.get(LOSS) is not None
    ]


def last_loss(run: Path) -> float | None:
    """Return the last validation loss of a run folder; None where it was not a number."""
    events = [e for e in files.read_json_lines(run / "metrics.jsonl") if LOSS in e]
    return events[-1][LOSS] if events else None


def shown(values: Mapping[str, object]) -> str:
    """Return a trial's values for reading."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
