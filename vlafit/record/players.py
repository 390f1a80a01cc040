"""Who plays which episode when: this process or several others, and which seeds are still to be played."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from vlafit import envs
from vlafit.datasets.card import RecordSpec
from vlafit.errors import SimulationError
from vlafit.record.episode import play
from vlafit.record.folder import Folder, RecordedFile
from vlafit.record.job import Job
from vlafit.types import Env

ATTEMPTS = 3  # times the episodes wanted; more attempts than that and the expert is no expert


@dataclass(frozen=True)
class RecordProgress:
    """How far a recording is: episodes of all tasks, and the time it took and is likely to take."""

    task: str
    done: int
    wanted: int
    skipped: int
    elapsed_s: float
    remaining_s: float | None


class Tally:
    """Counts what is done and tells the caller."""

    def __init__(self, spec: RecordSpec, progress: Callable[[RecordProgress], None], started: float) -> None:
        self.complete: dict[str, RecordedFile] = {}
        self._spec, self._progress, self._started = spec, progress, started
        self._done = self._skipped = 0
        self._kept = 0  # of `_done`, from an earlier call: they say nothing about the pace

    def add(self, file: RecordedFile | None) -> None:
        """Note a file that was there already."""
        if file is not None:
            self.complete[file.task] = file
            self._done += file.episodes
            self._kept += file.episodes
            self._skipped += len(file.skipped)

    def played(self, task: str, succeeded: bool, *, earlier: bool = False) -> None:
        """Note an episode."""
        self._done += int(succeeded)
        self._skipped += int(not succeeded)
        self._kept += int(succeeded and earlier)
        wanted = len(self._spec.tasks) * self._spec.episodes_per_task
        elapsed = time.monotonic() - self._started
        fresh = self._done - self._kept
        remaining = elapsed / fresh * (wanted - self._done) if fresh else None
        self._progress(RecordProgress(task, self._done, wanted, self._skipped, elapsed, remaining))


class _Schedule:
    """Which seeds of which task to play next.

    The first seeds of a task, as many as episodes are wanted, and one more for every failure: so exactly the
    shortest run of seeds with enough successes is played, in whatever order the episodes end.
    """

    def __init__(self, tasks: Iterable[str], spec: RecordSpec) -> None:
        self._spec = spec
        self.outcomes: dict[str, dict[int, bool]] = {task: {} for task in tasks}
        self._following = dict.fromkeys(self.outcomes, spec.first_seed + spec.episodes_per_task)
        seeds = range(spec.first_seed, spec.first_seed + spec.episodes_per_task)
        self.waiting = deque((task, seed) for task in self.outcomes for seed in seeds)

    def ended(self, task: str, seed: int, succeeded: bool) -> bool:
        """Note how an episode ended; return whether its task has enough of them."""
        spec, outcomes = self._spec, self.outcomes[task]
        outcomes[seed] = succeeded
        good = sum(outcomes.values())
        if not succeeded:
            if len(outcomes) - good > (ATTEMPTS - 1) * spec.episodes_per_task + 10:
                raise SimulationError(
                    f"task {task!r}: the expert succeeded in only {good} of {len(outcomes)} episodes within "
                    f"{spec.horizon} steps; leave the task out, or raise the card's record.horizon"
                )
            self.waiting.appendleft((task, self._following[task]))
            self._following[task] += 1
        return good == spec.episodes_per_task


def play_all(tasks: list[str], job: Job, where: Folder, pool: Executor, width: int, tally: Tally) -> None:
    """Play what is missing, `width` episodes at a time; write each task's file once it has enough."""
    schedule = _Schedule(tasks, job.record)
    kept = {task: where.played(task) for task in tasks}
    running: dict[Future[bool], tuple[str, int]] = {}

    def ended(task: str, seed: int, succeeded: bool, *, earlier: bool) -> None:
        enough = schedule.ended(task, seed, succeeded)
        if enough:
            tally.complete[task] = where.write_file(task, schedule.outcomes[task])
        tally.played(task, succeeded, earlier=earlier)

    while schedule.waiting or running:
        while schedule.waiting and len(running) < width:
            task, seed = schedule.waiting.popleft()
            if seed in kept[task]:
                ended(task, seed, kept[task][seed], earlier=True)
            else:
                running[pool.submit(_play_and_save, task, seed)] = (task, seed)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            ended(*running.pop(future), future.result(), earlier=False)


@contextmanager
def players(job: Job, workers: int, where: Folder) -> Iterator[Executor]:
    """Yield what plays the episodes: this process, or so many others."""
    if workers <= 1:
        _begin(job, where)
        try:
            yield _Here()
        finally:
            _end()
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(job, where, os.getpid())
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise SimulationError(
            "a recording process died, perhaps for want of memory; finished episodes are kept: "
            "go on with --resume and fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        """Call `fn` now; an error is raised here."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class _Player:
    job: Job
    where: Folder
    env: Env


_player: _Player | None = None  # of this process; an environment is too costly to make for every episode


def _begin(job: Job, where: Folder) -> None:
    global _player
    _player = _Player(job, where, envs.make(job.spec))


def _end() -> None:
    global _player
    if _player is not None:
        _player.env.close()
    _player = None


def _begin_worker(job: Job, where: Folder, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which lets episodes end
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _begin(job, where)


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _play_and_save(task: str, seed: int) -> bool:
    assert _player is not None
    return _player.where.save_part(task, seed, play(_player.env, _player.job.record, task, seed))
