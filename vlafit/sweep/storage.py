"""Store a study's trials in Optuna's SQLite database: hand out the next trial, retry those of dead workers.

A worker holds a lock file while its trial runs, and the system releases it when the worker dies. So a running
trial whose lock is free is dead: it is marked as failed, and tried again with its number, values and folder.
Optuna cannot start a trial twice, so it counts the second attempt as another trial; our numbers do not.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vlafit import files
from vlafit.errors import StorageError, VlafitError
from vlafit.sweep.study import Dimension, Study

if TYPE_CHECKING:
    import optuna

NAME = "sweep"
DATABASE = "study.db"
RETRIES = 2  # of a trial whose worker died, since its last checkpoint
FOLDER, RETRY_OF, TRIED, SAVED, ERROR = (
    "folder",
    "retry_of",
    "tried",
    "saved",
    "error",
)  # attributes of a trial
WAIT_S = 60.0  # time-out of SQLite's own lock


@dataclass
class Taken:
    """A trial that this worker runs."""

    trial: "optuna.Trial"
    number: int
    """Its number, which a second attempt keeps; Optuna's is another one then."""
    values: dict[str, object]
    folder: Path
    lock: IO[str] = field(repr=False)


class Storage:
    """The study in its folder, shared by all workers on this machine."""

    def __init__(self, folder: Path, study: Study, steps: int) -> None:
        """Open or create the study. Raises VlafitError if Optuna is not installed."""
        self.folder, self.study = folder, study
        optuna = _optuna()
        self.optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = (
            optuna.pruners.MedianPruner(
                n_startup_trials=study.startup, n_warmup_steps=round(study.warmup * steps)
            )
            if study.prune
            else optuna.pruners.NopPruner()
        )
        files.require_writable(folder / "locks")
        with self._all_locked(), self.database():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{(folder / DATABASE).resolve()}",
                engine_kwargs={"connect_args": {"timeout": WAIT_S}},
            )
            self.optuna_study = optuna.create_study(
                storage=storage, study_name=NAME, direction="minimize", pruner=pruner, load_if_exists=True
            )

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """Return all trials, in order."""
        with self.database():
            return self.optuna_study.get_trials(deepcopy=False)

    def take(self, wanted: int) -> Taken | None:
        """Start the next trial with sampled values; None if `wanted` trials have been started."""
        with self._all_locked(), self.database():
            self._requeue_dead()
            trials = self.trials()
            waiting = any(t.state == self.optuna.trial.TrialState.WAITING for t in trials)
            if not waiting and len(started(trials)) >= wanted:
                return None
            number = max((number_of(t) for t in trials), default=-1) + 1
            # Seeded by the trial's number, so that a study that was interrupted draws the values that an
            # undisturbed one would. A queued trial has its values already.
            self.optuna_study.sampler = self.optuna.samplers.TPESampler(
                seed=self.study.seed * 1_000_003 + number, n_startup_trials=self.study.startup
            )
            trial = self.optuna_study.ask()
            values = {name: suggest(trial, name, dim) for name, dim in self.study.search.items()}
            folder_name = trial.user_attrs.get(FOLDER) or f"{number:04d}"
            trial.set_user_attr(FOLDER, folder_name)
            lock = self._try_lock(trial.number)
            assert lock is not None, "a new trial's lock is free"
            return Taken(trial, int(folder_name), values, self.folder / "trials" / folder_name, lock)

    def done(self, taken: Taken, value: float) -> None:
        """Record a complete trial."""
        self._tell(taken, value, None)

    def pruned(self, taken: Taken) -> None:
        """Record a trial that was stopped early by the pruner."""
        self._tell(taken, None, self.optuna.trial.TrialState.PRUNED)

    def failed(self, taken: Taken, error: str) -> None:
        """Record a trial that failed; it is not tried again."""
        with self.database():
            taken.trial.set_user_attr(ERROR, error)
        self._tell(taken, None, self.optuna.trial.TrialState.FAIL)

    def interrupted(self, taken: Taken) -> None:
        """Record a trial that was interrupted, and queue it to be resumed by the next worker."""
        with self._all_locked(), self.database():
            self._requeue(taken.trial.number, deaths=0)
        taken.lock.close()

    def _tell(self, taken: Taken, value: float | None, state: Any) -> None:
        with self.database():
            self.optuna_study.tell(taken.trial, value, state=state)
        taken.lock.close()

    # ---------------------------------------------------------------------------------------- dead workers

    def _requeue_dead(self) -> None:
        """Mark running trials whose worker died as failed, and queue their values again."""
        for trial in self.trials():
            if trial.state != self.optuna.trial.TrialState.RUNNING:
                continue
            lock = self._try_lock(trial.number)
            if lock is not None:
                lock.close()
                self._requeue(trial.number, deaths=1)

    def _requeue(self, number: int, deaths: int) -> None:
        """Queue a trial again, then mark it as failed: a kill between the two must not lose it."""
        trials = self.trials()
        trial = trials[number]
        saved = self._saved(trial.user_attrs.get(FOLDER, ""))
        earlier = 0 if saved > trial.user_attrs.get(SAVED, 0) else int(trial.user_attrs.get(TRIED, 0))
        tried = earlier + deaths
        queued = any(other.user_attrs.get(RETRY_OF) == number for other in trials)
        if tried <= RETRIES and FOLDER in trial.user_attrs and not queued:
            queued_values = trial.system_attrs.get("fixed_params", {})  # of an attempt that died at once
            self.optuna_study.enqueue_trial(
                {**queued_values, **trial.params},
                user_attrs={FOLDER: trial.user_attrs[FOLDER], RETRY_OF: number, TRIED: tried, SAVED: saved},
            )
        self.optuna_study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def _saved(self, name: str) -> int:
        """Return the step of the last checkpoint in a trial's run; 0 without one."""
        folders = (self.folder / "trials" / name / "run" / "checkpoints").glob("step_*")
        return max((int(path.name.removeprefix("step_")) for path in folders), default=0)

    def _try_lock(self, number: int) -> IO[str] | None:
        file = open(self.folder / "locks" / str(number), "w", encoding="utf-8")  # noqa: SIM115
        try:
            self._lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    @contextmanager
    def _all_locked(self) -> Iterator[None]:
        with open(self.folder / "locks" / "all", "w", encoding="utf-8") as file:
            self._lock(file, fcntl.LOCK_EX)
            yield

    def _lock(self, file: IO[str], how: int) -> None:
        """Lock a file. Raises BlockingIOError if another worker has it, StorageError if nobody can."""
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the file system has no locks ({error.strerror}), which a sweep's workers "
                "and SQLite need; choose --out on another one"
            ) from error

    @contextmanager
    def database(self) -> Iterator[None]:
        """Raise StorageError where SQLite cannot read or write the study."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, self.optuna.exceptions.StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
            reason = str(getattr(cause, "orig", None) or error).split("\n")[0]
            raise StorageError(
                f"{self.folder / DATABASE}: {reason}; fix its permissions or free space, restore the file, "
                "or choose another --out (the runs of its trials stay where they are)"
            ) from error


def number_of(trial: "optuna.trial.FrozenTrial") -> int:
    """Return a trial's number; -1 if it has none yet, or its worker died before it had."""
    return int(trial.user_attrs.get(FOLDER, -1))


def started(trials: Sequence["optuna.trial.FrozenTrial"]) -> list["optuna.trial.FrozenTrial"]:
    """Return the last attempts of the trials that have a number and do not wait, by number."""
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    last = [t for t in trials if t.state.name != "WAITING" and t.number not in retried]
    return sorted((t for t in last if number_of(t) >= 0), key=number_of)


def suggest(trial: "optuna.Trial", name: str, dimension: Dimension) -> object:
    """Sample a value. Choices are passed as JSON texts, because Optuna does not support lists."""
    low, high = dimension.low, dimension.high
    if low is None or high is None:
        return json.loads(trial.suggest_categorical(name, [json.dumps(v) for v in dimension.choices]))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=dimension.log)
    return trial.suggest_float(name, low, high, log=dimension.log)


def values_of(params: Mapping[str, Any], study: Study) -> dict[str, object]:
    """Return a trial's values with choices decoded from JSON."""
    return {
        name: json.loads(value) if name in study.search and study.search[name].choices else value
        for name, value in params.items()
    }


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise VlafitError("vlafit sweep needs Optuna; install it: pip install 'vlafit[sweep]'") from error
    return optuna
