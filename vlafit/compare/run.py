"""A comparison from options to report: try learning rates, train and judge every arm, write the page.

A finished arm is a JSON file and is never run again, so the same command goes on with a comparison that was
stopped, over days if need be. An arm that breaks is recorded with its last words, and tried again next time:
it goes on with the strategy that it began with, or begins anew where the strategy's file has changed since.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vlafit import config, files
from vlafit.compare import arms, record
from vlafit.compare.arms import Arm, Candidate, Options
from vlafit.compare.identity import digest, settle
from vlafit.compare.judge import Choice, Standing, choose_lr
from vlafit.compare.process import Ended, Processes, stopping, vlafit
from vlafit.compare.record import Record
from vlafit.errors import ConfigError, VlafitError
from vlafit.recipe import Recipe
from vlafit.train.data import open_data
from vlafit.train.preflight import check

IDENTITY = "identity.json"
log = logging.getLogger(__name__)


class Observer:
    """Shows nothing; the command line's shows each arm as it ends."""

    def phase(self, name: str, arms: int) -> None:
        """So many arms are to be run now."""

    def arm(self, name: str, record: Record, fresh: bool) -> None:
        """An arm ended; not `fresh`: it had ended before."""


@dataclass(frozen=True)
class Comparison:
    """All arms of a comparison, as far as they came."""

    folder: Path
    recipe: Recipe
    options: Options
    identity: dict
    standings: tuple[Standing, ...]
    records: tuple[Record, ...]
    """Every arm that ended, those that only tried a learning rate among them."""
    missing: tuple[str, ...]
    """Arms that were asked for and have not ended."""
    command: str = ""

    @property
    def broken(self) -> tuple[Record, ...]:
        """Arms that ended without figures."""
        return tuple(record for record in self.records if not record.finished)

    def log(self, arm: str) -> Path:
        """Return the file of what an arm's processes printed."""
        return log_of(self.folder, arm)


def run(
    recipe: Recipe, options: Options, out: Path, *, command: str = "", observer: Observer | None = None
) -> Comparison:
    """Carry out a comparison in the folder `out`, or go on with it; a signal stops it after saving.

    Raises ConfigError where `out` holds another comparison, where an arm could not train (naming the faults
    of all), and whatever data or protocol raise; then nothing was written.
    """
    for name, values in (("--seeds", options.seeds), ("--strategies", options.strategies)):
        if not values:
            raise ConfigError(f"{name} is empty; name at least one")
    if options.jobs < 1 or not 1 <= options.grid_seeds <= len(options.seeds):
        raise ConfigError("--jobs is at least 1, and the learning rates are tried by one seed or more")
    for lr in options.lr_grid:
        if not 0 < lr < float("inf"):
            raise ConfigError(f"--lr-grid: a learning rate is above 0, not {lr}")
    if len(set(options.lr_grid)) < len(options.lr_grid):
        raise ConfigError("--lr-grid names a learning rate twice; name each once")
    check(recipe, 1)
    found = arms.candidates(options.strategies)
    data = open_data(recipe.data, options.seeds[0])
    now = arms.identity(recipe, options.seeds, data)
    rates = options.lr_grid or (recipe.optim.lr,)
    arms.require_possible(recipe, found, rates, data, play=not (out / IDENTITY).is_file())
    settle(out / IDENTITY, "comparison", now)
    with files.exclusive(out, "vlafit compare") as lock:
        work = _Work(recipe, options, out, digest(now), lock, observer or Observer())
        with stopping(work.processes.stop):
            standings = work.carry_out(found)
        return Comparison(
            out, recipe, options, now, standings, tuple(work.records.values()), tuple(work.missing), command
        )


def log_of(folder: Path, arm: str) -> Path:
    """Return the file of what an arm's processes printed, in the comparison's folder."""
    return folder / "logs" / f"{arm}.log"


def _remove(run: Path) -> None:
    """Remove an arm's folder; one that is killed meanwhile leaves no half of it in its place."""
    aside = run.with_name(f".{run.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if run.is_dir():
        run.rename(aside)
        shutil.rmtree(aside)


class _Work:
    """A comparison under way."""

    def __init__(
        self, recipe: Recipe, options: Options, out: Path, identity: str, lock: int, observer: Observer
    ) -> None:
        self.recipe, self.options, self.out = recipe, options, out
        self.identity, self.observer = identity, observer
        self.processes = Processes(options.jobs, keep_open=[lock])
        self.records: dict[str, Record] = {}
        self.missing: list[str] = []

    def carry_out(self, found: Sequence[Candidate]) -> tuple[Standing, ...]:
        """Try the learning rates, then run every seed at the chosen one."""
        options = self.options
        choices: dict[str, Choice | None] = {}
        if options.lr_grid:
            tried = {
                one.label: [Arm(one, lr, seed) for lr in options.lr_grid for seed in self._searching()]
                for one in found
            }
            self._all("trying learning rates", [a for group in tried.values() for a in group], judged=False)
            for label, group in tried.items():
                by_lr: dict[float, list[Record]] = {lr: [] for lr in options.lr_grid}
                for arm in group:
                    if arm.name in self.records:
                        by_lr[arm.lr].append(self.records[arm.name])
                choices[label] = choose_lr(by_lr) if self._whole(group) else None
        wanted = {}
        for one in found:
            choice = choices.get(one.label)
            if options.lr_grid and choice is None:  # every learning rate broke, or the comparison was stopped
                wanted[one.label] = []
                continue
            lr = choice.lr if choice else self.recipe.optim.lr
            wanted[one.label] = [Arm(one, lr, seed) for seed in options.seeds]
        self._all("training", [a for group in wanted.values() for a in group], judged=True)
        return tuple(
            Standing(
                one.label,
                wanted[one.label][0].lr if wanted[one.label] else None,
                tuple(self.records[a.name] for a in wanted[one.label] if a.name in self.records),
                choices.get(one.label),
                one.adapts,
            )
            for one in found
        )

    def _searching(self) -> tuple[int, ...]:
        return self.options.seeds[: self.options.grid_seeds]

    def _whole(self, group: Sequence[Arm]) -> bool:
        return all(arm.name in self.records for arm in group)

    def _all(self, phase: str, wanted: Sequence[Arm], *, judged: bool) -> None:
        """Run arms side by side; those that ended before are taken as they are."""
        for arm in wanted:
            self._require_same_strategy(arm)
        self.observer.phase(phase, len(wanted))
        with ThreadPoolExecutor(self.options.jobs) as pool:
            ended = list(pool.map(lambda arm: self._one(arm, judged=judged), wanted))
        for arm, one in zip(wanted, ended, strict=True):
            if one is None:
                self.missing.append(arm.name)
            else:
                self.records[arm.name] = one

    def _one(self, arm: Arm, *, judged: bool) -> Record | None:
        """Run one arm to its end; None where it was stopped before."""
        run = self.out / "arms" / arm.name
        path = run / record.FILE
        there = record.read(path)
        judged = judged or not arms.asks_for_rollouts(self.recipe)
        if there is not None and there.finished and (there.judged or not judged):
            self.observer.arm(arm.name, there, False)
            return there
        began = self._begin(arm, run, there)
        recipe = arms.recipe_of(arm, self.recipe, rollouts=judged)
        written = self.out / "recipes" / f"{arm.name}.toml"
        files.write_atomic(written, config.dump(recipe))
        if not (run / "recipe.toml").is_file():
            path.unlink(missing_ok=True)  # a run begins in a folder that holds nothing
        words = vlafit("train", str(written), "--out", str(run), "--resume")
        ended = self.processes.run(words, log_of(self.out, arm.name))
        if self.processes.stopped and ended.status != 0:
            return None
        found = self._outcome(arm, run, ended, judged)
        if not found.finished:  # one that finished was of this content, or train had refused to go on with it
            found = replace(found, strategy_sha256=began)
        record.write(path, found)
        self.observer.arm(arm.name, found, True)
        return found

    def _begin(self, arm: Arm, run: Path, there: Record | None) -> str:
        """Return the hash of the strategy with which the arm's run began, "" where nothing tells.

        A run without figures that began with another content than today's is removed: it begins anew.
        """
        now = arm.candidate.sha256
        if there is not None and there.finished:
            return there.strategy_sha256
        kept = self.out / "recipes" / f"{arm.name}.sha256"
        began = None
        if kept.is_file():
            began = kept.read_text(encoding="utf-8").strip()
        elif there is not None and there.strategy_sha256 != now:
            began = there.strategy_sha256
        if began not in (None, now):
            log.warning(
                "%s: strategy %r has changed since it began; it begins anew", arm.name, arm.candidate.label
            )
            _remove(run)
        if not (run / "recipe.toml").is_file():
            files.write_atomic(kept, f"{now}\n")
            return now
        return began or ""

    def _outcome(self, arm: Arm, run: Path, ended: Ended, judged: bool) -> Record:
        if ended.status != 0:
            return record.record_of(arm, self.identity, judged=judged, error=ended.error)
        try:
            return record.record_of(arm, self.identity, judged=judged, figures=record.figures(run))
        except VlafitError as error:
            return record.record_of(arm, self.identity, judged=judged, error=str(error))

    def _require_same_strategy(self, arm: Arm) -> None:
        """Raise ConfigError where the folder holds the arm with other content of its strategy."""
        path = self.out / "arms" / arm.name / record.FILE
        there = record.read(path)
        if there is None:
            return
        if there.finished and there.strategy_sha256 != arm.candidate.sha256:
            raise ConfigError(
                f"{path}: the arm was run with another content of strategy {arm.candidate.label!r} (hash "
                f"{there.strategy_sha256[:12]}, now {arm.candidate.sha256[:12]}); bring the file back, give "
                "the changed one another name, or choose another --out"
            )
        if there.identity != self.identity:
            raise ConfigError(f"{path}: belongs to another comparison; remove the folder {path.parent}")
