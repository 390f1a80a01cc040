"""Stopping an evaluation from outside leaves no process behind and nothing that cannot be gone on with."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.actors import Obedient
from tests.variants import variants
from tests.waiting import alive, wait_until
from vlafit.rollout import Protocol, evaluate

SCRIPT = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from tests.rollout.actors import Obedient
from tests.rollout.conftest import make_protocol
from vlafit.rollout import evaluate
# no "if __name__": environment processes do not run their caller's script again
evaluate(Obedient(), make_protocol("left", "hang", trials=3), Path(sys.argv[1]), workers=2, videos=0)
"""


def children(pid: int) -> set[int]:
    return {int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "how",
    variants([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], always=[signal.SIGKILL]),
)
def test_an_evaluation_that_is_stopped_ends_its_processes_even_hanging_ones(
    how: signal.Signals, protocol: Callable[..., Protocol], tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = out / "episodes.jsonl"
    try:
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, run)
        workers = children(run.pid)
        assert len(workers) == 2
    finally:
        run.send_signal(how)
        run.wait(timeout=60)
    wait_until(lambda: not any(alive(pid) for pid in workers))
    kept = log.read_text().splitlines()
    resumed = evaluate(Obedient(), protocol("left", "hang", trials=3), out, workers=2, videos=0, timeout_s=2)
    assert resumed.overall.errors == 1 and resumed.overall.episodes == 5
    assert set(kept) <= set(log.read_text().splitlines())  # not one of them was played again
