"""Distribute the episodes of a recording over this process or several workers."""

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
from multiprocessing import util

from vlafit import envs
from vlafit.datasets.card import RecordSpec
from vlafit.envs.garbage import keep_contexts
from vlafit.errors import SimulationError
from vlafit.record.episode import play
from vlafit.record.plan import RecordingPlan
from vlafit.record.recording_folder import RecordedFile, RecordingFolder
from vlafit.types import Env

ATTEMPTS = 3  # attempts per wanted episode before the expert is considered unable to solve the task


@dataclass(frozen=True)
class RecordProgress:
    """Progress of a recording over all tasks, with elapsed and estimated remaining time."""

    task: str
    done: int
    wanted: int
    skipped: int
    elapsed_s: float
    remaining_s: float | None


class Tally:
    """Counts recorded episodes and reports progress to the caller."""

    def __init__(self, spec: RecordSpec, progress: Callable[[RecordProgress], None], started: float) -> None:
        self.complete: dict[str, RecordedFile] = {}
        self._spec, self._progress, self._started = spec, progress, started
        self._done = self._skipped = 0
        self._kept = 0  # episodes of an earlier call, which do not count for the speed

    def add(self, file: RecordedFile | None) -> None:
        """Count the episodes of a file that was finished earlier."""
        if file is not None:
            self.complete[file.task] = file
            self._done += file.episodes
            self._kept += file.episodes
            self._skipped += len(file.skipped)

    def played(self, task: str, succeeded: bool, *, earlier: bool = False) -> None:
        """Count an episode."""
        self._done += int(succeeded)
        self._skipped += int(not succeeded)
        self._kept += int(succeeded and earlier)
        wanted = len(self._spec.tasks) * self._spec.episodes_per_task
        elapsed = time.monotonic() - self._started
        fresh = self._done - self._kept
        remaining = elapsed / fresh * (wanted - self._done) if fresh else None
        self._progress(RecordProgress(task, self._done, wanted, self._skipped, elapsed, remaining))


class _Schedule:
    """Chooses the next task and seed.

    A task gets as many first seeds as episodes are wanted, and one more for every failure. So it runs exactly
    the shortest range of seeds with enough successes, in whatever order the episodes end.
    """

    def __init__(self, tasks: Iterable[str], spec: RecordSpec) -> None:
        self._spec = spec
        self.outcomes: dict[str, dict[int, bool]] = {task: {} for task in tasks}
        self._next_seed = dict.fromkeys(self.outcomes, spec.first_seed + spec.episodes_per_task)
        seeds = range(spec.first_seed, spec.first_seed + spec.episodes_per_task)
        self.waiting = deque((task, seed) for task in self.outcomes for seed in seeds)

    def ended(self, task: str, seed: int, succeeded: bool) -> bool:
        """Note an episode's outcome; return whether its task now has enough successes."""
        spec, outcomes = self._spec, self.outcomes[task]
        outcomes[seed] = succeeded
        good = sum(outcomes.values())
        if not succeeded:
            if len(outcomes) - good > (ATTEMPTS - 1) * spec.episodes_per_task + 10:
                raise SimulationError(
                    f"task {task!r}: the expert succeeded in only {good} of {len(outcomes)} episodes within "
                    f"{spec.horizon} steps; remove the task, or raise the card's record.horizon"
                )
            self.waiting.appendleft((task, self._next_seed[task]))
            self._next_seed[task] += 1
        return good == spec.episodes_per_task


def play_all(
    tasks: list[str],
    plan: RecordingPlan,
    folder: RecordingFolder,
    pool: Executor,
    width: int,
    tally: Tally,
) -> None:
    """Run the missing episodes, `width` at a time; write each task's file when it has enough successes."""
    schedule = _Schedule(tasks, plan.record)
    kept = {task: folder.played(task) for task in tasks}
    running: dict[Future[bool], tuple[str, int]] = {}

    def ended(task: str, seed: int, succeeded: bool, *, earlier: bool) -> None:
        enough = schedule.ended(task, seed, succeeded)
        if enough:
            tally.complete[task] = folder.write_file(task, schedule.outcomes[task])
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
def executor(plan: RecordingPlan, workers: int, folder: RecordingFolder) -> Iterator[Executor]:
    """Yield the executor that runs the episodes: this process, or `workers` others."""
    if workers <= 1:
        _start(plan, folder)
        try:
            yield _InProcess()
        finally:
            _stop()
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(plan, folder, os.getpid())
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise SimulationError(
            "a recording process died, perhaps because memory ran out; finished episodes are kept: "
            "continue with --resume and fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _InProcess(Executor):
    """Runs each task immediately in this process."""

    def submit(self, fn, /, *args, **kwargs):
        """Call `fn` now; its errors are raised here."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class _Worker:
    plan: RecordingPlan
    folder: RecordingFolder
    env: Env


_worker: _Worker | None = None  # of this process; creating an environment for every episode costs too much


def _start(plan: RecordingPlan, folder: RecordingFolder) -> None:
    global _worker
    keep_contexts()
    _worker = _Worker(plan, folder, envs.make(plan.spec))


def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.env.close()
    _worker = None


def _start_worker(plan: RecordingPlan, folder: RecordingFolder, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which lets episodes end
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    # Before the interpreter's own exit, where EGL is gone already and freeing a renderer prints an error.
    util.Finalize(None, _stop, exitpriority=1)
    _start(plan, folder)


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent is gone, because a killed parent cannot stop its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _play_and_save(task: str, seed: int) -> bool:
    assert _worker is not None
    return _worker.folder.save_part(task, seed, play(_worker.env, _worker.plan.record, task, seed))
