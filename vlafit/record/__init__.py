"""Recording demonstrations with a scripted expert, as a data card asks: LIBERO's layout, one file a task.

The episodes of a task are its first so many seeds that the expert solves, so neither the number of workers
nor an interruption changes a byte. Finished episodes wait in a hidden folder beside the files until their
task is complete. This package and its workers import no torch.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlafit import envs
from vlafit.datasets.card import Card
from vlafit.errors import ConfigError
from vlafit.record.folder import Folder, RecordedFile
from vlafit.record.job import job_of, require_recordable
from vlafit.record.players import RecordProgress, Tally, play_all, players

__all__ = ["RecordProgress", "RecordReport", "RecordedFile", "record"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordReport:
    """What a recording made."""

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
    """Record what `card` asks for into the folder `out`, one file a task.

    `episodes_per_task` replaces the card's number. With `resume`, finished files and episodes of an earlier
    call that asked for the same are kept; without it, `out` must hold no recording. With 0 or 1 `workers`
    episodes are played in this process. Raises ConfigError for a card that cannot be recorded,
    EmbodimentError when its robot is not the simulation's, DataError for what is in the way in `out`, and
    SimulationError when the simulation or the expert fails.
    """
    started = time.monotonic()
    if workers < 0:
        raise ConfigError(f"record: workers must be at least 0, not {workers}")
    job = job_of(card, episodes_per_task)
    env = envs.make(job.spec)
    try:
        require_recordable(card, job, env)
        where = Folder(Path(out), job, env)
    finally:
        env.close()
    where.prepare(resume)
    tally = Tally(job.record, progress, started)
    for task in job.record.tasks:
        tally.add(where.finished(task))
    open_tasks = [task for task in job.record.tasks if task not in tally.complete]
    if open_tasks:
        with players(job, workers, where) as pool:
            play_all(open_tasks, job, where, pool, max(1, workers), tally)
    where.clean()
    seconds = time.monotonic() - started
    done = tuple(tally.complete[task] for task in job.record.tasks)
    log.info("recorded %d episodes of %s in %.0f s", sum(f.episodes for f in done), card.name, seconds)
    return RecordReport(done, seconds)
