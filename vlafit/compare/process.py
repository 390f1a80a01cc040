"""Training runs as processes of their own: peak memory is theirs alone, and a crash of one ends no other.

A run that is killed or told to stop can be gone on with.
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

LAST_WORDS = 12  # lines of a log that are kept of a run that broke,
LONGEST_WORDS = 100  # and of a message or traceback at its end

LONGEST_REASON = 400  # characters
WORDS = "; its last words:\n"


@dataclass(frozen=True)
class Ended:
    """How a process ended: status 0, or its last words."""

    status: int
    words: str = ""

    @property
    def error(self) -> str:
        """What to say of one that broke."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            hint = " (the system does that when memory is short)" if name == "SIGKILL" else ""
            return f"ended by {name}{hint}{WORDS}{self.words}"
        return f"exit status {self.status}{WORDS}{self.words}"


def reason(error: str) -> str:
    """Return what `Ended.error` says in one line: our message, the exception, or the signal."""
    head, _, words = error.partition(WORDS)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    if head.startswith("ended by ") or not lines:
        return head.strip()
    said = " ".join(lines).removeprefix("vlafit: ") if lines[0].startswith("vlafit: ") else lines[-1]
    return said if len(said) <= LONGEST_REASON else f"{said[: LONGEST_REASON - 3]}..."


class Processes:
    """Processes that run at once, each on its share of the machine; `stop` asks all to save and end."""

    def __init__(self, jobs: int, keep_open: Sequence[int] = ()) -> None:
        """`keep_open` are file descriptors that the processes inherit: locks that must outlive this one."""
        self.jobs, self.keep_open = jobs, tuple(keep_open)
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)

    def run(self, command: Sequence[str], log: Path) -> Ended:
        """Run `command`, its output appended to `log`; called from a thread for each process."""
        slot = self._slots.get()
        try:
            return self._run(command, log, slot)
        finally:
            self._slots.put(slot)

    def _run(self, command: Sequence[str], log: Path, slot: int) -> Ended:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            began = out.tell()
            with self._guard:
                if self.stopped:
                    return Ended(130, "not begun")
                process = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._surroundings(slot),
                    pass_fds=self.keep_open,
                    start_new_session=True,  # Ctrl-C is for this process, which passes it on
                )
                self._running.add(process)
            status = process.wait()
            with self._guard:
                self._running.discard(process)
        return Ended(status, "" if status == 0 else _last_words(log, began))

    def stop(self) -> None:
        """Start nothing more, and ask what runs to save and end."""
        self.stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _surroundings(self, slot: int) -> Mapping[str, str]:
        cores = max(1, cpu_cores() // self.jobs)
        found = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
        devices = _devices() if self.jobs > 1 else []
        if len(devices) > 1:
            found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return found


def cpu_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES would name each."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def vlafit(*words: str) -> list[str]:
    """Return the command line of a verb in a process of its own."""
    return [sys.executable, "-m", "vlafit", *words]


def _last_words(log: Path, began: int) -> str:
    """Return our own message whole, or a traceback, if it ended with one; else the last lines."""
    with open(log, "rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").strip().splitlines()
    for word in ("vlafit: ", "Traceback (most recent call last)"):
        begins = [i for i, line in enumerate(lines) if line.startswith(word)]
        if begins:
            return "\n".join(lines[begins[-1] :][:LONGEST_WORDS])
    return "\n".join(lines[-LAST_WORDS:])


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Within this block SIGINT and SIGTERM call `stop` instead of ending this process at once."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return
    old = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
