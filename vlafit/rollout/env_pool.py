"""A pool of environment processes: start, communicate, time out, replace dead ones, stop.

Each process holds several environments ("slots"), so that few processes fill a policy's batch. `play` knows
what an episode is and what to do when one fails; this module does not.
"""

import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection as mpc
from types import TracebackType

from vlafit.envs import EnvSpec
from vlafit.envs.messages import REPLIES, Ended, Failed, Moved, Play, Ready, Reply, Reset, Start, Unplayable
from vlafit.envs.wire import LARGEST, WireError, decode, encode
from vlafit.errors import SimulationError
from vlafit.rollout import env_process
from vlafit.rollout.env_process import EnvProcess

START_TIMEOUT_S = 300.0  # importing a simulator and compiling its kernels can take minutes
WAIT_S = 0.5  # the longest that `wait` blocks
FRAME = re.compile(r'  File "([^"]+)", line (\d+), in (\S+)')  # of a traceback


class _UnplayableError(SimulationError):
    """An environment was created but could not begin, or not draw, one episode."""


@dataclass(frozen=True)
class EnvSlot:
    """One environment of one process; it runs one episode at a time."""

    process: int
    index: int


@dataclass(frozen=True)
class Advanced:
    """The command of a slot succeeded."""

    slot: EnvSlot
    moved: Moved


@dataclass(frozen=True)
class Broken:
    """The command of a slot raised, or its process died or hung during the command."""

    slot: EnvSlot
    text: str


@dataclass(frozen=True)
class Interrupted:
    """The process of a slot was replaced because the episode of another slot failed."""

    slot: EnvSlot


Event = Advanced | Broken | Interrupted


@dataclass
class _Process:
    """One process. `pending` holds the slots of its unanswered commands in order.

    The first command, Start, belongs to no slot (None).
    """

    itself: EnvProcess
    pending: deque[int | None] = field(default_factory=lambda: deque([None]))
    since: float = field(default_factory=time.monotonic)  # when the current command started

    @property
    def link(self) -> mpc.Connection:
        """The connection to it."""
        return self.itself.link


class EnvPool:
    """Processes with several environments each; as a context manager it kills every process at exit.

    `describe` starts the first process, `fill` the others. `timeout_s` is the longest time for one command: a
    chunk of steps, or a reset.
    """

    def __init__(self, spec: EnvSpec, timeout_s: float) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self.slots: tuple[EnvSlot, ...] = ()
        self._start_timeout_s = max(START_TIMEOUT_S, timeout_s)
        self._processes: list[_Process] = []
        self._idle_deaths = 0

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_all()

    def describe(
        self, starts: Sequence[tuple[str, int]] = (), seeds: Mapping[str, tuple[int, int]] | None = None
    ) -> Ready:
        """Start one process, wait until it has created an environment, and return its description.

        `starts` are (task, seed) of episodes of which one must be possible to begin and to draw: a renderer
        that cannot draw fails them all, a broken start only its own. `seeds`: of each task, the first seed of
        its episodes and their number, for the description's `missing`; while one is, no episode is begun.
        Raises SimulationError with the reason.
        """
        for i, start in enumerate(starts or [None]):
            process = self._start(start, seeds)
            self._processes = [process]
            if not process.link.poll(self._start_timeout_s):
                raise self._cannot_start(process, self._not_started)
            try:
                return self._receive_ready(process, start)
            except _UnplayableError:
                if i == len(starts) - 1:
                    raise
        raise AssertionError("unreachable")

    def fill(self, processes: int, slots: int) -> None:
        """Start the other processes; each then has `slots` environments."""
        for _ in range(processes - len(self._processes)):
            self._processes.append(self._start())
        self.slots = tuple(EnvSlot(p, i) for i in range(slots) for p in range(processes))

    def send(self, slot: EnvSlot, command: Reset | Play) -> None:
        """Send a slot its next command; `wait` returns the outcome."""
        process = self._processes[slot.process]
        if not process.pending:
            process.since = time.monotonic()
        process.pending.append(slot.index)
        try:
            process.link.send_bytes(encode(command))
        except OSError:
            pass  # the process died; `wait` reports it for the pending slot

    @property
    def room(self) -> tuple[int, int]:
        """Processors and bytes of free memory where the processes are; `describe` comes first."""
        return self._processes[0].itself.room

    @property
    def busy(self) -> bool:
        """Whether any command is still unanswered."""
        return any(p.pending for p in self._processes)

    def wait(self) -> list[Event]:
        """Block until events arrive, at most WAIT_S, and return them; the list may be empty.

        A time limit that ends before is noticed when it ends.
        """
        left_s = [self._limit_s(p) - (time.monotonic() - p.since) for p in self._processes if p.pending]
        ready = set(mpc.wait([p.link for p in self._processes], max(0.0, min([WAIT_S, *left_s]))))
        now = time.monotonic()  # taken once: handling replies below must not count as waiting
        events: list[Event] = []
        for number, process in enumerate(self._processes):
            waited_s = now - process.since if process.pending else 0.0
            if process.pending and process.pending[0] is None:
                if process.link in ready:
                    self._receive_ready(process)
                elif waited_s > self._limit_s(process):
                    raise self._cannot_start(process, self._not_started)
            elif process.link in ready:
                events += self._receive(number, process)
            elif waited_s > self._limit_s(process):
                why = f"the environment did not answer within {self.timeout_s:g} s and was killed"
                events += self._replace(number, process, why)
        return events

    def _limit_s(self, process: _Process) -> float:
        """Return the longest time for the command that a process is working on."""
        return self._start_timeout_s if process.pending and process.pending[0] is None else self.timeout_s

    def _receive(self, number: int, process: _Process) -> list[Event]:
        try:
            reply = _received(process)
        except WireError as error:
            return self._replace(number, process, f"the environment process was killed: it sent {error}")
        except Exception:  # the process died, perhaps in the middle of a message
            return self._replace(number, process, "")
        process.since = time.monotonic()
        if isinstance(reply, Ended):
            return self._replace(number, process, reply.text)
        slot = process.pending.popleft()
        match reply, slot:
            case Moved(), int():
                return [Advanced(EnvSlot(number, slot), reply)]
            case Failed(text), int():
                return [Broken(EnvSlot(number, slot), text)]
        raise RuntimeError(f"unexpected message from an environment process: {reply!r}")

    def _receive_ready(self, process: _Process, start: tuple[str, int] | None = None) -> Ready:
        try:
            reply = _received(process)
        except WireError as error:
            raise self._cannot_start(process, f"its process sent {error}") from error
        except Exception:  # the process died, perhaps in the middle of a message
            if start is not None:
                raise self._cannot_play(process, "", start) from None
            raise self._cannot_start(process, "") from None
        if isinstance(reply, Unplayable) and start is not None:
            raise self._cannot_play(process, reply.text, start)
        if isinstance(reply, Ended) and start is not None:
            raise self._cannot_play(process, reply.text, start)
        if isinstance(reply, Moved):
            raise self._cannot_start(process, "its process answered the first command with Moved")
        if not isinstance(reply, Ready):
            raise self._cannot_start(process, reply.text)
        process.pending.popleft()
        process.since = time.monotonic()
        return reply

    @property
    def _environment(self) -> str:
        """The environment as messages name it, with the interpreter that it runs in."""
        return f"environment {self.spec.name!r}" + (f" in {self.spec.python}" if self.spec.python else "")

    @property
    def _not_started(self) -> str:
        return f"its process was not ready within {self._start_timeout_s:g} s and was killed"

    def _cannot_start(self, process: _Process, why: str) -> SimulationError:
        text = process.itself.kill(why).strip()
        return _summed_up(SimulationError, f"{self._environment} cannot be created", text)

    def _cannot_play(self, process: _Process, why: str, start: tuple[str, int]) -> SimulationError:
        text = process.itself.kill(why).strip()
        task, seed = start
        or_not = "cannot be created, or " if self.spec.python and not why else ""
        head = f"{self._environment} {or_not}cannot show the start of task {task!r}, seed {seed}"
        return _summed_up(_UnplayableError, head, text)

    def _replace(self, number: int, process: _Process, why: str) -> list[Event]:
        """Kill a process and start another: the slot it was working for is broken, the others interrupted."""
        index = process.pending[0] if process.pending else None
        active = None if index is None else EnvSlot(number, index)
        text = process.itself.kill(why)
        self._idle_deaths += active is None
        if self._idle_deaths > 3:
            raise SimulationError(f"{self._environment}: its processes die while idle: {text}")
        self._processes[number] = self._start()
        others = [slot for slot in self.slots if slot.process == number and slot != active]
        broken: list[Event] = [Broken(active, text)] if active else []
        return [*broken, *(Interrupted(slot) for slot in others)]

    def _start(
        self, start: tuple[str, int] | None = None, seeds: Mapping[str, tuple[int, int]] | None = None
    ) -> _Process:
        try:
            process = _Process(env_process.start(self.spec))
        except OSError as error:
            raise SimulationError(f"{self._environment} cannot be started: {error}") from error
        try:
            process.link.send_bytes(encode(Start(self.spec, start, self.timeout_s, seeds or {})))
        except OSError:
            pass  # the process died at once; `_receive_ready` reports it
        return process

    def _end_all(self) -> None:
        for process in self._processes:
            process.itself.end()
        self._processes = []


def _received(process: _Process) -> Reply:
    """Return a process's next message. Raises WireError for one that is none, EOFError where it ended."""
    try:
        data = process.link.recv_bytes(LARGEST)
    except OSError as error:
        if error.errno is None:  # of multiprocessing, not of the system
            raise WireError(f"what is no message of at most {LARGEST} bytes") from error
        raise
    return decode(data, REPLIES)


def _summed_up(kind: type[SimulationError], head: str, text: str) -> SimulationError:
    """Return an error with the last words of a process; a traceback among them becomes its cause."""
    lines = text.splitlines()
    frames = [(number, match) for number, line in enumerate(lines) if (match := FRAME.match(line))]
    if not frames:
        return kind(f"{head}: {text}")
    number, frame = frames[-1]
    raised = next((line for line in lines[number + 1 :] if not line.startswith(" ")), "")
    error = kind(f"{head}: {raised} (in {frame[3]}, {frame[1]}, line {frame[2]})")
    error.__cause__ = kind(f"{head}:\n{text}")
    return error
