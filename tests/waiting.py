"""Wait for what another process does: the only polling in the tests, because a file sends no event."""

import subprocess
import time
from collections.abc import Callable

import psutil

POLL_S = 0.005


def wait_until(
    happened: Callable[[], bool], process: "subprocess.Popen | None" = None, timeout_s: float = 120
) -> None:
    """Return when `happened()` is true. Fails if the process ends first, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing happened in {timeout_s:.0f} s"
        time.sleep(POLL_S)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
