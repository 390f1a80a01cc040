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
NOT_STARTED = f"its process was not ready within {START_TIMEOUT_S:g} s, and was ended"
PATIENCE_S = 0.5  # of `wait`
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
    """One running child. `pending` holds the slots of the commands that it has not answered, in order.

    Its first command, Start, belongs to no slot.
    """

    child: subprocess.Popen[bytes]
    link: mpc.Connection
    output: IO[bytes]
    pending: deque[int | None] = field(default_factory=lambda: deque([None]))
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
        self._described: Ready | None = None

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
        for process in self._processes:
            if process.link.poll(START_TIMEOUT_S):
                self._receive_ready(process)
            else:
                raise self._cannot_start(process, NOT_STARTED)
        assert self._described is not None
        return self._described

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
        """Block until something happened, at most PATIENCE_S, and return it; perhaps nothing."""
        ready = set(mpc.wait([p.link for p in self._processes], PATIENCE_S))
        now = time.monotonic()  # what came by now is in `ready`, whatever the handling below takes
        events: list[Event] = []
        for number, process in enumerate(self._processes):
            waited_s = now - process.since if process.pending else 0.0
            if process.pending and process.pending[0] is None:
                if process.link in ready:
                    self._receive_ready(process)
                elif waited_s > START_TIMEOUT_S:
                    raise self._cannot_start(process, NOT_STARTED)
            elif process.link in ready:
                events += self._receive(number, process)
            elif waited_s > self.timeout_s:
                why = f"the environment did not answer within {self.timeout_s:g} s, and was ended"
                events += self._replace(number, process, why)
        return events

    def _receive(self, number: int, process: _Process) -> list[Event]:
        try:
            reply = process.link.recv()
        except Exception:  # it died, perhaps in the middle of a message
            return self._replace(number, process, "")
        process.since = time.monotonic()
        slot = process.pending.popleft()
        match reply, slot:
            case Moved(), int():
                return [Advanced(Seat(number, slot), reply)]
            case Failed(text), int():
                return [Broken(Seat(number, slot), text)]
        raise RuntimeError(f"an environment process said {reply!r} out of turn")

    def _receive_ready(self, process: _Process) -> None:
        try:
            reply = process.link.recv()
        except Exception:  # it died, perhaps in the middle of a message
            raise self._cannot_start(process, "") from None
        if not isinstance(reply, Ready):
            raise self._cannot_start(process, reply.text)
        process.pending.popleft()
        process.since = time.monotonic()
        self._described = reply

    def _cannot_start(self, process: _Process, why: str) -> SimulationError:
        text = self._last_words(process, why).strip()
        return SimulationError(f"environment {self.spec.name!r} cannot be made: {text}")

    def _replace(self, number: int, process: _Process, why: str) -> list[Event]:
        """End a process and start another. The seat it was working for is broken, its others interrupted."""
        head = process.pending[0] if process.pending else None
        culprit = None if head is None else Seat(number, head)
        text = self._last_words(process, why)
        self._idle_deaths += culprit is None
        if self._idle_deaths > 3:
            raise SimulationError(f"environment {self.spec.name!r}: its processes die while idle: {text}")
        self._processes[number] = self._start()
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
            pass  # it died at once: `_receive_ready` tells
        return process

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
