"""Search of a recipe's fields and a strategy's rules with Optuna, resumable, by one worker or several.

`run` carries a sweep out, in this process or with worker processes, and `write` makes its report. Modules:
`study` (what is searched), `storage` (trials in Optuna's database), `worker` (runs trials), `report` (page,
JSON, the best recipe).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vlafit import locks
from vlafit.compare.identity import write_or_require_same
from vlafit.compare.process import Ended, Processes, reason, stopping
from vlafit.errors import VlafitError
from vlafit.sweep.report import SweepResult, read, write
from vlafit.sweep.study import Dimension, Study, load_study
from vlafit.sweep.worker import Sweep, require_possible, run_trials

__all__ = ["Dimension", "Study", "Sweep", "SweepResult", "load_study", "read", "run", "write"]

IDENTITY = "identity.json"
RESTARTS = 5  # of a worker that dies, before the sweep stops restarting it


def run(
    sweep: Sweep,
    where: str,
    *,
    workers: int = 1,
    worker_command: Callable[[], list[str]] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> bool:
    """Run or resume a sweep; return False if a signal stopped it before all trials had ended.

    With several `workers`, each is a process started by `worker_command`; one that dies is restarted and its
    trial tried again. `where` names the study's file in errors; `tell` receives a line per ended trial.
    Raises ConfigError for a study that cannot be searched, or the folder of another sweep, and VlafitError if
    workers died so often that trials are left.
    """
    write_or_require_same(sweep.folder / IDENTITY, "sweep", require_possible(sweep, where))
    locks.remove_abandoned(sweep.folder)
    if workers <= 1 or worker_command is None:
        return run_trials(sweep, tell)
    processes = Processes(workers)

    def run_worker(number: int) -> Ended:
        ended = Ended(0)
        for _ in range(RESTARTS + 1):
            ended = processes.run(worker_command(), sweep.folder / "logs" / f"worker-{number}.log")
            if ended.status in (0, 130) or processes.stopped:
                break
            tell(f"worker {number} died: {reason(ended.error)}")
        return ended

    with stopping(processes.stop), ThreadPoolExecutor(workers) as pool:
        ends = list(pool.map(run_worker, range(workers)))
    if all(ended.status == 0 for ended in ends):
        return True
    left = sweep.study.trials - read(sweep).ended
    died = [number for number, ended in enumerate(ends) if ended.status not in (0, 130)]
    if left > 0 and died and not processes.stopped:
        raise VlafitError(
            f"{sweep.folder}: {left} of {sweep.study.trials} trials have not ended, because worker {died[0]} "
            f"died {RESTARTS + 1} times, the last time: {reason(ends[died[0]].error)}. Its log: "
            f"{sweep.folder / 'logs' / f'worker-{died[0]}.log'}. The same command resumes the sweep"
        )
    return left <= 0
