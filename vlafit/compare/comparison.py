"""Run a comparison: try the learning rates, then train and evaluate every arm.

A finished arm is a JSON file and is never run again, so the same command resumes a comparison that was
stopped. An arm that fails is recorded with its last output and tried again next time: it resumes, or starts
again if its strategy's file has changed.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vlafit import config, files, locks
from vlafit.compare import arm_record, arms
from vlafit.compare.arm_record import ArmRecord
from vlafit.compare.arms import Arm, Candidate, Options
from vlafit.compare.identity import digest, write_or_require_same
from vlafit.compare.process import Ended, Processes, stopping, vlafit
from vlafit.compare.standing import Choice, Standing, choose_lr
from vlafit.errors import ConfigError, VlafitError
from vlafit.files import plain_text
from vlafit.recipe import Recipe
from vlafit.train.data import open_data
from vlafit.train.preflight import check

IDENTITY = "identity.json"
log = logging.getLogger(__name__)


class Observer:
    """Callbacks that do nothing; the command line overrides them to show progress."""

    def phase(self, name: str, arms: int) -> None:
        """Called before a number of arms is run."""

    def arm(self, name: str, record: ArmRecord, fresh: bool) -> None:
        """Called when an arm has ended; `fresh` is False if an earlier command ran it."""


@dataclass(frozen=True)
class Comparison:
    """All arms of a comparison with the results so far."""

    folder: Path
    recipe: Recipe
    options: Options
    identity: dict
    standings: tuple[Standing, ...]
    records: tuple[ArmRecord, ...]
    """Every arm that has ended, including those that only tried a learning rate."""
    missing: tuple[str, ...]
    """Requested arms that have not ended."""
    command: str = ""

    @property
    def broken(self) -> tuple[ArmRecord, ...]:
        """Arms that failed."""
        return tuple(record for record in self.records if not record.finished)

    def log(self, arm: str) -> Path:
        """Return the log file of an arm's processes."""
        return log_of(self.folder, arm)


def run(
    recipe: Recipe, options: Options, out: Path, *, command: str = "", observer: Observer | None = None
) -> Comparison:
    """Run or resume a comparison in the folder `out`; a signal stops it after saving.

    Raises ConfigError if `out` holds another comparison or an arm could not train (naming all faults), and
    the errors of data and protocol; then nothing has been written.
    """
    for name, values in (("--seeds", options.seeds), ("--strategies", options.strategies)):
        if not values:
            raise ConfigError(f"{name} is empty; name at least one")
    if options.jobs < 1 or not 1 <= options.grid_seeds <= len(options.seeds):
        raise ConfigError("--jobs must be at least 1, and at least one seed must try the learning rates")
    for lr in options.lr_grid:
        if not 0 < lr < float("inf"):
            raise ConfigError(f"--lr-grid: a learning rate must be above 0, is {lr}")
    if len(set(options.lr_grid)) < len(options.lr_grid):
        raise ConfigError("--lr-grid lists a learning rate twice; list each once")
    check(recipe, 1)
    candidates = arms.candidates(options.strategies)
    data = open_data(recipe.data, options.seeds[0])
    now = arms.identity(recipe, options.seeds, data)
    rates = options.lr_grid or (recipe.optim.lr,)
    arms.require_possible(recipe, candidates, rates, data, play=not (out / IDENTITY).is_file())
    write_or_require_same(out / IDENTITY, "comparison", now)
    with locks.exclusive(out, "vlafit compare") as lock:
        for name in ("arms", "recipes"):
            files.tidy(out / name)
        runner = _Runner(recipe, options, out, digest(now), lock, observer or Observer())
        with stopping(runner.processes.stop):
            standings = runner.run_all(candidates)
        records, missing = tuple(runner.records.values()), tuple(runner.missing)
        return Comparison(out, recipe, options, now, standings, records, missing, command)


def log_of(folder: Path, arm: str) -> Path:
    """Return the log file of an arm's processes in the comparison's folder."""
    return folder / "logs" / f"{arm}.log"


def _remove(run: Path) -> None:
    """Remove an arm's folder, renaming it first so that a kill leaves no partial folder in its place."""
    aside = run.with_name(f".{run.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if run.is_dir():
        run.rename(aside)
        shutil.rmtree(aside)


class _Runner:
    """A comparison in progress."""

    def __init__(
        self, recipe: Recipe, options: Options, out: Path, identity: str, lock: int, observer: Observer
    ) -> None:
        self.recipe, self.options, self.out = recipe, options, out
        self.identity, self.observer = identity, observer
        self.processes = Processes(options.jobs, keep_open=[lock])
        self.records: dict[str, ArmRecord] = {}
        self.missing: list[str] = []

    def run_all(self, candidates: Sequence[Candidate]) -> tuple[Standing, ...]:
        """Try the learning rates, then run every seed at the chosen one."""
        options = self.options
        choices: dict[str, Choice | None] = {}
        if options.lr_grid:
            grid_seeds = options.seeds[: options.grid_seeds]
            grids = {
                candidate.label: [Arm(candidate, lr, seed) for lr in options.lr_grid for seed in grid_seeds]
                for candidate in candidates
            }
            self._run("trying learning rates", [a for grid in grids.values() for a in grid], judged=False)
            choices = {label: self._choose_lr(grid) for label, grid in grids.items()}
        wanted: dict[str, list[Arm]] = {}
        for candidate in candidates:
            choice = choices.get(candidate.label)
            if (
                options.lr_grid and choice is None
            ):  # every learning rate failed, or the comparison was stopped
                wanted[candidate.label] = []
                continue
            lr = choice.lr if choice else self.recipe.optim.lr
            wanted[candidate.label] = [Arm(candidate, lr, seed) for seed in options.seeds]
        self._run("training", [a for group in wanted.values() for a in group], judged=True)
        return tuple(
            Standing(
                candidate.label,
                wanted[candidate.label][0].lr if wanted[candidate.label] else None,
                tuple(self.records[a.name] for a in wanted[candidate.label] if a.name in self.records),
                choices.get(candidate.label),
                candidate.adapts,
            )
            for candidate in candidates
        )

    def _choose_lr(self, grid: Sequence[Arm]) -> Choice | None:
        """Return the best learning rate of a strategy's grid; None if an arm of the grid has not ended."""
        by_lr: dict[float, list[ArmRecord]] = {lr: [] for lr in self.options.lr_grid}
        for arm in grid:
            if arm.name not in self.records:
                return None
            by_lr[arm.lr].append(self.records[arm.name])
        return choose_lr(by_lr)

    def _run(self, phase: str, wanted: Sequence[Arm], *, judged: bool) -> None:
        """Run arms in parallel; the results of finished arms are kept."""
        for arm in wanted:
            self._require_same_strategy(arm)
        self.observer.phase(phase, len(wanted))
        with ThreadPoolExecutor(self.options.jobs) as pool:
            records = list(pool.map(lambda arm: self._run_arm(arm, judged=judged), wanted))
        for arm, record in zip(wanted, records, strict=True):
            if record is None:
                self.missing.append(arm.name)
            else:
                self.records[arm.name] = record

    def _run_arm(self, arm: Arm, *, judged: bool) -> ArmRecord | None:
        """Run one arm to its end; None if it was stopped."""
        run = self.out / "arms" / arm.name
        path = run / arm_record.FILE
        existing = arm_record.read(path)
        judged = judged or not arms.asks_for_rollouts(self.recipe)
        if existing is not None and existing.finished and (existing.judged or not judged):
            self.observer.arm(arm.name, existing, False)
            return existing
        strategy_sha256 = self._initial_strategy(arm, run, existing)
        recipe = arms.recipe_of(arm, self.recipe, rollouts=judged)
        recipe_file = self.out / "recipes" / f"{arm.name}.toml"
        files.write_atomic(recipe_file, config.dump(recipe))
        if not (run / "recipe.toml").is_file():
            path.unlink(missing_ok=True)  # `vlafit train` starts only in an empty folder
        command = vlafit("train", str(recipe_file), "--out", str(run), "--resume")
        ended = self.processes.run(command, log_of(self.out, arm.name))
        if self.processes.stopped and ended.status != 0:
            return None
        record = self._outcome(arm, run, ended, judged)
        if not record.finished:  # `vlafit train` itself refuses to finish a run with a changed strategy
            record = replace(record, strategy_sha256=strategy_sha256)
        arm_record.write(path, record)
        self.observer.arm(arm.name, record, True)
        return record

    def _initial_strategy(self, arm: Arm, run: Path, existing: ArmRecord | None) -> str:
        """Return the hash of the strategy with which the arm's run started, "" if unknown.

        An unfinished run that started with another content of the strategy is removed and starts again.
        """
        current = arm.candidate.sha256
        if existing is not None and existing.finished:
            return existing.strategy_sha256
        hash_file = self.out / "recipes" / f"{arm.name}.sha256"
        initial = None
        if hash_file.is_file():
            initial = plain_text(hash_file).strip()
        elif existing is not None and existing.strategy_sha256 != current:
            initial = existing.strategy_sha256
        if initial not in (None, current):
            log.warning(
                "%s: strategy %r has changed since the arm started; it starts again",
                arm.name,
                arm.candidate.label,
            )
            _remove(run)
        if not (run / "recipe.toml").is_file():
            files.write_atomic(hash_file, f"{current}\n")
            return current
        return initial or ""

    def _outcome(self, arm: Arm, run: Path, ended: Ended, judged: bool) -> ArmRecord:
        if ended.status != 0:
            return arm_record.record_of(arm, self.identity, judged=judged, error=ended.error)
        try:
            return arm_record.record_of(arm, self.identity, judged=judged, figures=arm_record.figures(run))
        except VlafitError as error:
            return arm_record.record_of(arm, self.identity, judged=judged, error=str(error))

    def _require_same_strategy(self, arm: Arm) -> None:
        """Raise ConfigError if the folder holds the finished arm with another content of its strategy."""
        path = self.out / "arms" / arm.name / arm_record.FILE
        existing = arm_record.read(path)
        if existing is None:
            return
        if existing.finished and existing.strategy_sha256 != arm.candidate.sha256:
            raise ConfigError(
                f"{path}: the arm was run with another content of strategy {arm.candidate.label!r} (hash "
                f"{existing.strategy_sha256[:12]}, now {arm.candidate.sha256[:12]}); restore the file, give "
                "the changed file another name, or choose another --out"
            )
        if existing.identity != self.identity:
            raise ConfigError(f"{path}: belongs to another comparison; remove the folder {path.parent}")
