"""Run training as child processes, so that each has its own peak memory and a crash affects only one.

A run that is killed or asked to stop can be resumed. Runs stop when this process ends, even if it is killed.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlafit import parent

LAST_LINES = 12  # lines of the log kept of a failed run
MAX_LINES = 100  # lines kept if the log ends with an error message or traceback

MAX_REASON = 400  # characters
OUTPUT = "; last output:\n"
OLD_OUTPUT = "; its last words:\n"  # in records written before 2026-11-26


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, and its last output unless the status is 0."""

    status: int
    output: str = ""

    @property
    def error(self) -> str:
        """The error to record for a failed process."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
            return f"ended by {name}{hint}{self._last}"
        return f"exit status {self.status}{self._last}"

    @property
    def _last(self) -> str:
        return f"{OUTPUT}{self.output}" if self.output else ""


def reason(error: str) -> str:
    """Return `Ended.error` in one line: vlafit's message, the exception, or the signal."""
    head, _, output = error.replace(OLD_OUTPUT, OUTPUT).partition(OUTPUT)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if head.startswith("ended by ") or not lines:
        return head.strip()
    line = " ".join(lines).removeprefix("vlafit: ") if lines[0].startswith("vlafit: ") else lines[-1]
    return line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 3]}..."


class Processes:
    """Up to `jobs` processes at once, each with a share of the machine; `stop` asks all to save and exit."""

    def __init__(self, jobs: int, keep_open: Sequence[int] = ()) -> None:
        """`keep_open`: file descriptors that children inherit, for locks that must outlive this process."""
        self.jobs, self.keep_open = jobs, tuple(keep_open)
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)

    def run(self, command: Sequence[str], log: Path) -> Ended:
        """Run `command`, appending its output to `log`; call it from one thread per process."""
        slot = self._slots.get()
        try:
            return self._run(command, log, slot)
        finally:
            self._slots.put(slot)

    def _run(self, command: Sequence[str], log: Path, slot: int) -> Ended:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            start = out.tell()
            with self._guard:
                if self.stopped:
                    return Ended(130, "not started")
                process = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=parent.STDIN,
                    env=self._environment(slot),
                    pass_fds=self.keep_open,
                    start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
                )
                self._running.add(process)
            status = process.wait()
            assert process.stdin is not None
            process.stdin.close()
            with self._guard:
                self._running.discard(process)
        return Ended(status, "" if status == 0 else _last_output(log, start))

    def stop(self) -> None:
        """Start no more processes, and ask the running ones to save and exit."""
        self.stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _environment(self, slot: int) -> Mapping[str, str]:
        cores = max(1, cpu_cores() // self.jobs)
        variables = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
        variables[parent.VARIABLE] = "1"
        devices = _devices() if self.jobs > 1 else []
        if len(devices) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return variables


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[str]:
    """Return the GPUs as names for CUDA_VISIBLE_DEVICES."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def vlafit(*words: str) -> list[str]:
    """Return the command line that runs a vlafit verb in a child process."""
    return [sys.executable, "-m", "vlafit", *words]


def _last_output(log: Path, start: int) -> str:
    """Return vlafit's error message or the traceback at the end of a log; without either, the last lines."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    for prefix in ("vlafit: ", "Traceback (most recent call last)"):
        matches = [i for i, line in enumerate(lines) if line.startswith(prefix)]
        if matches:
            return "\n".join(lines[matches[-1] :][:MAX_LINES])
    return "\n".join(lines[-LAST_LINES:])


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Within this block a signal that asks to end calls `stop` instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can catch signals
        yield
        return
    old = {number: signal.signal(number, lambda *_: stop()) for number in parent.ending_signals()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
