"""Serve environments to evaluations on other machines, each connection with a process of its own.

    python -m vlafit.envs.host --port 7000 [--host ADDRESS]

Run it with the interpreter that has the simulator, beside numpy, msgpack and vlafit's source; torch is not
needed. The evaluation names it: `vlafit eval ... --env-python tcp://127.0.0.1:7000`. It listens on this
machine alone unless `--host` says otherwise: whoever reaches the port can start processes and have them
import any module that this Python finds. From elsewhere: `ssh -L 7000:127.0.0.1:7000 MACHINE`.

The process answers its connection itself, with the messages of an environment process of the same machine.
This one only watches: a process whose caller has gone is killed, even in a step that never ends, and the end
of a process is told to its caller with the last lines that it wrote.
"""

import argparse
import hashlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from vlafit.envs.messages import Ended, Hello
from vlafit.envs.wire import encode

log = logging.getLogger("vlafit.envs.host")

OWN = "from vlafit.envs.worker import main; main({handle})"
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)  # a container's limit and use, in cgroups of version 2 and 1
TAIL_LINES = 30  # lines of a dead process's output kept in the error record
SILENT_S, PROBE_S, PROBES = 30, 10, 6  # a connection of which nothing is heard for a minute and a half ends


def main() -> int:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(
        prog="python -m vlafit.envs.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, required=True, help="0: a free one, which is printed")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine alone]"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        listener = socket.create_server((options.host, options.port))
    except (OSError, OverflowError) as error:
        log.error("cannot listen on %s, port %s: %s", options.host, options.port, error)
        return 1
    host, port = listener.getsockname()[:2]
    log.info("environments at tcp://%s:%d", host, port)
    children: set[subprocess.Popen[bytes]] = set()
    try:
        while True:
            connection, (peer, *_) = listener.accept()
            threading.Thread(target=serve, args=(connection, peer, children), daemon=True).start()
    except KeyboardInterrupt:
        return 0
    finally:
        listener.close()
        for child in list(children):
            child.kill()


def serve(connection: socket.socket, peer: str, children: set[subprocess.Popen[bytes]]) -> None:
    """Start a process for one connection, and watch both until either ends."""
    keep_watch(connection)
    with (
        connection,
        tempfile.TemporaryFile() as output,
        Connection(os.dup(connection.fileno())) as link,
        suppress(OSError),  # the caller has gone
    ):
        link.send_bytes(encode(Hello(source_sha256(), cores(), free_bytes())))
        child = subprocess.Popen(
            [sys.executable, "-c", OWN.format(handle=connection.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[connection.fileno()],
            env=environment(),
        )
        children.add(child)
        log.info("%s: process %d", peer, child.pid)
        try:
            gone = caller_goes_first(connection, child)
            if gone:
                child.kill()
            text = ending(child.wait(), output)
            log.info("%s: process %d: %s", peer, child.pid, "its caller went" if gone else text)
            if not gone:
                link.send_bytes(encode(Ended(text)))
        finally:
            child.kill()
            children.discard(child)


def caller_goes_first(connection: socket.socket, child: subprocess.Popen[bytes]) -> bool:
    """Wait for the end of the connection or of the process; return whether it was the connection's."""
    process = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLRDHUP)
        poll.register(process, select.POLLIN)
        return process not in dict(poll.poll())
    finally:
        os.close(process)


def keep_watch(connection: socket.socket) -> None:
    """Send small messages at once, and notice that the other machine is gone although it said nothing."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


def ending(status: int, output: IO[bytes]) -> str:
    """Return how a process ended, and the last lines that it wrote."""
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return "\n".join([f"the environment process ended {how}", *last_lines(output)])


def last_lines(output: IO[bytes]) -> list[str]:
    """Return the last lines of a process's output."""
    output.seek(0)
    return output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def environment() -> dict[str, str]:
    """Return the variables of an environment process, which finds the modules that this one does."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return {**os.environ, "PYTHONPATH": path} | THREADS


def source_sha256() -> str:
    """Return a hash of vlafit's code that environments run: both sides must be of one version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in [*sorted((package / "envs").glob("*.py")), package / "types.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Return the free memory of this machine, or of the container that it is."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    of = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return within_container(int(of["MemAvailable"].split()[0]) << 10)


def within_container(free: int) -> int:
    """Return the free bytes of a machine, or those of the container that it is, where they are fewer."""
    for limit, used in CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no container, or "max": no limit
            continue
    return max(0, free)


if __name__ == "__main__":
    sys.exit(main())
