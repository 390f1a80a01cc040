"""Search of a recipe's fields and a strategy's rules with Optuna, resumable, by one worker or several.

`run` carries a sweep out, alone or with workers of its own, and `write` makes its report. Around them:
`study` (what is searched), `storage` (whose turn it is), `work` (one worker), `report` (page, JSON, the best
recipe).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vlafit.compare.identity import settle
from vlafit.compare.process import Ended, Processes, stopping
from vlafit.sweep.report import Found, read, write
from vlafit.sweep.study import Dimension, Study, load_study
from vlafit.sweep.work import Sweep, require_possible, work

__all__ = ["Dimension", "Found", "Study", "Sweep", "load_study", "read", "run", "write"]

IDENTITY = "identity.json"
RESTARTS = 5  # of a worker that dies, before the sweep gives it up


def run(
    sweep: Sweep,
    where: str,
    *,
    workers: int = 1,
    worker_command: Callable[[], list[str]] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> bool:
    """Carry out a sweep, or go on with it; False when a signal stopped it before it had all its trials.

    With more than one of `workers`, each is a process started by `worker_command`; one that dies is started
    again, and its trial tried again. `where` names the study's file in errors. Raises ConfigError for a study
    that cannot be searched, or a folder of another sweep.
    """
    settle(sweep.folder / IDENTITY, "sweep", require_possible(sweep, where))
    if workers <= 1 or worker_command is None:
        return work(sweep, tell)
    processes = Processes(workers)

    def keep_going(number: int) -> Ended:
        ended = Ended(0)
        for _ in range(RESTARTS + 1):
            ended = processes.run(worker_command(), sweep.folder / "logs" / f"worker-{number}.log")
            if ended.status in (0, 130) or processes.stopped:
                break
            tell(f"worker {number} died: {ended.error.splitlines()[0]}")
        return ended

    with stopping(processes.stop), ThreadPoolExecutor(workers) as pool:
        return all(ended.status == 0 for ended in pool.map(keep_going, range(workers)))
