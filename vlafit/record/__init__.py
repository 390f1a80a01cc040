"""Record demonstrations of a scripted expert as a data card specifies: LIBERO layout, one file per task.

A task's episodes are the first seeds that the expert solves, so neither the number of workers nor an
interruption changes a byte. Finished episodes are kept in a hidden folder next to the files until their task
is complete. This package and its workers import no torch.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlafit import envs, locks
from vlafit.datasets.card import Card
from vlafit.errors import ConfigError
from vlafit.record.plan import plan_recording, require_recordable
from vlafit.record.recording_folder import RecordedFile, RecordingFolder
from vlafit.record.workers import RecordProgress, Tally, executor, play_all

__all__ = ["RecordProgress", "RecordReport", "RecordedFile", "record"]

log = logging.getLogger(__name__)

LOCKED_BY = "vlafit record"  # in messages about a folder that is in use
MOST_WORKERS = 1024  # processes


@dataclass(frozen=True)
class RecordReport:
    """The files of a finished recording."""

    files: tuple[RecordedFile, ...]
    seconds: float

    @property
    def episodes(self) -> int:
        """Episodes in all files."""
        return sum(file.episodes for file in self.files)

    @property
    def frames(self) -> int:
        """Frames in all files."""
        return sum(file.frames for file in self.files)


def record(
    card: Card,
    out: Path,
    *,
    episodes_per_task: int | None = None,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[RecordProgress], None] = lambda _: None,
) -> RecordReport:
    """Record the demonstrations that `card` specifies into the folder `out`, one file per task.

    `episodes_per_task` replaces the card's number. `resume` keeps finished files and episodes of an earlier
    call with the same settings; without it, `out` must hold no recording. With 0 or 1 `workers` the episodes
    run in this process. Raises ConfigError for a card that cannot be recorded, EmbodimentError if its robot
    is not the simulation's, DataError for other recordings in `out`, and SimulationError if the simulation or
    the expert fails.
    """
    started = time.monotonic()
    if not 0 <= workers <= MOST_WORKERS:
        bound = "at least 0" if workers < 0 else f"at most {MOST_WORKERS}"
        raise ConfigError(f"record: workers must be {bound}, not {workers}")
    plan = plan_recording(card, episodes_per_task)
    env = envs.make(plan.spec)
    try:
        require_recordable(card, plan, env)
        folder = RecordingFolder(Path(out), plan, env)
    finally:
        env.close()
    with locks.exclusive(folder.out, LOCKED_BY):
        folder.prepare(resume)
        tally = Tally(plan.record, progress, started)
        for task in plan.record.tasks:
            tally.add(folder.finished(task))
        open_tasks = [task for task in plan.record.tasks if task not in tally.complete]
        if open_tasks:
            with executor(plan, workers, folder) as pool:
                play_all(open_tasks, plan, folder, pool, max(1, workers), tally)
        folder.clean()
    seconds = time.monotonic() - started
    done = tuple(tally.complete[task] for task in plan.record.tasks)
    log.info("recorded %d episodes of %s in %.0f s", sum(f.episodes for f in done), card.name, seconds)
    return RecordReport(done, seconds)
