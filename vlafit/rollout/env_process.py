"""A process with environments, and the connection to it: a child of this one, or one on another machine."""

import re
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from multiprocessing import connection as mpc
from typing import final

from vlafit.envs import EnvSpec, host
from vlafit.envs.messages import Hello
from vlafit.envs.wire import LARGEST, WireError, decode
from vlafit.errors import SimulationError
from vlafit.rollout import interpreter, memory

CONNECT_S = 20.0  # longest time until another machine answers
TCP = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:/@]+):(?P<port>\d{1,5})")


class EnvProcess(ABC):
    """A process with environments; `link` is the connection to it."""

    link: mpc.Connection

    @abstractmethod
    def kill(self, why: str) -> str:
        """Kill the process (unless it died: `why` is empty); return how it ended and its last output."""

    @abstractmethod
    def end(self) -> None:
        """Kill the process and wait for its end."""

    @property
    @abstractmethod
    def room(self) -> tuple[int, int]:
        """Processors and bytes of free memory of the process's machine."""


def start(spec: EnvSpec) -> EnvProcess:
    """Start a process for environments of `spec`. Raises SimulationError where it cannot be started."""
    if "://" not in spec.python:
        return _Child(spec.python)
    match = TCP.fullmatch(spec.python)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise SimulationError(f"env.python: {spec.python!r} is no address; write tcp://HOST:PORT")
    return _Remote(match["host"].strip("[]"), int(match["port"]))


@final
class _Child(EnvProcess):
    """A child of this process."""

    def __init__(self, python: str) -> None:
        parent_end, child_end = socket.socketpair()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process is killed)
        try:
            self.child = subprocess.Popen(
                interpreter.command(python, child_end.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=[child_end.fileno()],
                env=interpreter.environment(python),
            )
        except (OSError, SimulationError):
            parent_end.close()
            self.output.close()
            raise
        finally:
            child_end.close()
        self.link = mpc.Connection(parent_end.detach())

    def kill(self, why: str) -> str:
        if why:
            self.child.kill()
        try:
            status = self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            status = self.child.wait()
        self.link.close()
        with self.output:
            if not why:
                return host.ending(status, self.output)
            return "\n".join([why, *host.last_lines(self.output)])

    def end(self) -> None:
        self.link.close()
        self.child.kill()
        self.child.wait()
        self.output.close()

    @property
    def room(self) -> tuple[int, int]:
        return host.cores(), memory.free_bytes()


@final
class _Remote(EnvProcess):
    """A process that `vlafit.envs.host` started for a connection to another machine."""

    def __init__(self, name: str, port: int) -> None:
        self.address = f"tcp://{name}:{port}"
        try:
            connection = socket.create_connection((name, port), CONNECT_S)
        except OSError as error:
            raise SimulationError(
                f"env.python: nothing answers at {self.address}: {error}; start it there with: "
                f"python -m vlafit.envs.host --port {port}"
            ) from error
        host.keep_watch(connection)
        connection.setblocking(True)
        self.link = mpc.Connection(connection.detach())
        try:
            hello = self._greeted()
        except SimulationError:
            self.link.close()
            raise
        self.room_there = hello.cores, hello.free_bytes

    def _greeted(self) -> Hello:
        """Return what the other side says of itself, if its code is this one's."""
        try:
            if not self.link.poll(CONNECT_S):
                raise SimulationError(f"env.python: {self.address} says nothing; is it vlafit.envs.host?")
            hello = decode(self.link.recv_bytes(LARGEST), (Hello,))
        except (OSError, EOFError, WireError) as error:
            why = str(error) or "it closed the connection"
            raise SimulationError(f"env.python: {self.address} is no vlafit.envs.host: {why}") from error
        if hello.source_sha256 != host.source_sha256():
            raise SimulationError(
                f"env.python: vlafit at {self.address} is of another version than vlafit here; install the "
                "same one on both machines"
            )
        return hello

    def kill(self, why: str) -> str:
        self.link.close()  # the other side then kills the process
        return why or f"the connection to {self.address} ended"

    def end(self) -> None:
        self.link.close()

    @property
    def room(self) -> tuple[int, int]:
        return self.room_there
