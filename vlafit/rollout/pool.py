"""Environment processes: started, listened to, timed, replaced when they die, and ended.

Each process holds several environments ("slots"), so that few processes fill a policy's batch. What an
episode is, and what to do about one that broke, is not known here (see `play`).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import connection as mpc
from types import TracebackType
from typing import IO

from vlafit.envs import EnvSpec
from vlafit.errors import SimulationError
from vlafit.rollout.worker import Failed, Moved, Play, Ready, Reset, Start

START_TIMEOUT_S = 300.0  # importing a simulator and compiling its kernels can take minutes
TAIL_LINES = 30  # of a dead process' output, kept in the error record


@dataclass(frozen=True)
class Seat:
    """A slot of a process: where one episode is played at a time."""

    process: int
    slot: int


@dataclass(frozen=True)
class Advanced:
    """The command of a seat was carried out."""

    seat: Seat
    moved: Moved


@dataclass(frozen=True)
class Broken:
    """The command of a seat raised, or its process died or hung while carrying it out."""

    seat: Seat
    text: str


@dataclass(frozen=True)
class Interrupted:
    """The process of a seat was replaced because of another seat's episode; this one did nothing wrong."""

    seat: Seat


Event = Advanced | Broken | Interrupted


@dataclass
class _Process:
    """One running child. `pending` holds the slots of the commands that it has not answered, in order."""

    child: subprocess.Popen[bytes]
    link: mpc.Connection
    output: IO[bytes]
    ready: bool = False
    pending: deque[int] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)  # when it began on the current command


class Pool:
    """Processes with `slots` environments each. A context manager: leaving it ends every process.

    `timeout_s` is the longest that one command may take: a chunk of steps, or a reset.
    """

    def __init__(self, spec: EnvSpec, processes: int, slots: int, timeout_s: float) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self.seats = tuple(Seat(p, s) for s in range(slots) for p in range(processes))
        self._processes: list[_Process] = []
        self._count = processes
        self._idle_deaths = 0

    def __enter__(self) -> "Pool":
        try:
            for _ in range(self._count):
                self._processes.append(self._start())
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_all()

    def describe(self) -> Ready:
        """Wait until every process has made its first environment, and return how that declares itself.

        Raises SimulationError with the process' own words if it cannot be made.
        """
        said = [self._await_ready(process) for process in self._processes]
        return said[0]

    def send(self, seat: Seat, command: Reset | Play) -> None:
        """Give a seat its next command. Its outcome comes from `wait`."""
        process = self._processes[seat.process]
        if not process.pending:
            process.since = time.monotonic()
        process.pending.append(seat.slot)
        try:
            process.link.send(command)
        except OSError:
            pass  # it died: `wait` finds out, and knows what it was doing

    @property
    def busy(self) -> bool:
        """Whether any command is still unanswered."""
        return any(p.pending for p in self._processes)

    def wait(self) -> list[Event]:
        """Block until something happened, at most about a second, and return it; perhaps nothing."""
        now = time.monotonic()
        deadlines = [p.since + self.timeout_s - now for p in self._processes if p.pending]
        ready = set(mpc.wait([p.link for p in self._processes], max(0.0, min([1.0, *deadlines]))))
        events: list[Event] = []
        for number, process in enumerate(self._processes):
            if process.link in ready:
                events += self._receive(number, process)
            elif process.pending and time.monotonic() - process.since > self.timeout_s:
                why = f"the environment did not answer within {self.timeout_s:g} s, and was ended"
                events += self._replace(number, process, why)
        return events

    def _receive(self, number: int, process: _Process) -> list[Event]:
        try:
            reply = process.link.recv()
        except Exception:  # it died, perhaps in the middle of a message
            return self._replace(number, process, "")
        process.since = time.monotonic()
        seat = Seat(number, process.pending.popleft())
        match reply:
            case Moved():
                return [Advanced(seat, reply)]
            case Failed(text):
                return [Broken(seat, text)]
        raise RuntimeError(f"an environment process said {reply!r} out of turn")

    def _replace(self, number: int, process: _Process, why: str) -> list[Event]:
        """End a process and start another. The seat it was working for is broken, its others interrupted."""
        culprit = Seat(number, process.pending[0]) if process.pending else None
        text = self._last_words(process, why)
        self._idle_deaths += culprit is None
        if self._idle_deaths > 3:
            raise SimulationError(f"environment {self.spec.name!r}: its processes die while idle: {text}")
        self._processes[number] = self._start()
        self._await_ready(self._processes[number])
        mine = [seat for seat in self.seats if seat.process == number and seat != culprit]
        broken: list[Event] = [Broken(culprit, text)] if culprit else []
        return [*broken, *(Interrupted(seat) for seat in mine)]

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process is ended)
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        code = f"from vlafit.rollout.worker import main; main({theirs.fileno()})"
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            env=env,
        )
        theirs.close()
        process = _Process(child, mpc.Connection(ours.detach()), output)
        try:
            process.link.send(Start(self.spec))
        except OSError:
            pass  # `_await_ready` tells
        return process

    def _await_ready(self, process: _Process) -> Ready:
        reply: object = None
        try:
            if process.link.poll(max(START_TIMEOUT_S, self.timeout_s)):
                reply = process.link.recv()
        except (EOFError, OSError):
            pass
        if isinstance(reply, Ready):
            process.since = time.monotonic()
            return reply
        text = reply.text if isinstance(reply, Failed) else self._last_words(process, "")
        raise SimulationError(
            f"environment {self.spec.name!r} cannot be made (see the last line of what its process said):\n"
            f"{text.strip()}"
        )

    def _last_words(self, process: _Process, why: str) -> str:
        """End a process for good; return how it ended and the last lines of what it wrote."""
        if why:
            process.child.kill()
        try:
            status = process.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.child.kill()
            status = process.child.wait()
        process.link.close()
        process.output.seek(0)
        lines = process.output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        process.output.close()
        if not why:
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            why = f"the environment process ended {how}"
        return "\n".join([why, *lines])

    def _end_all(self) -> None:
        for process in self._processes:
            process.link.close()
            process.child.kill()
        for process in self._processes:
            process.child.wait()
            process.output.close()
        self._processes = []
