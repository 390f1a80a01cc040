"""Wait for what another process does: the only polling in the tests, because a file sends no event."""

import subprocess
import time
from collections.abc import Callable

import psutil

POLL_S = 0.005
PATIENCE_S = 120


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen | None" = None) -> None:
    """Return when `happened()` is true. Fails if the process ends first, or without one after PATIENCE_S.

    A process that is slow is no failure, so only its end is.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if process is None:
            assert time.monotonic() < deadline, f"nothing happened in {PATIENCE_S} s"
        else:
            assert process.poll() is None, process.communicate()
        time.sleep(POLL_S)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
