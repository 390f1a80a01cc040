"""Thousands of requests, one in a hundred malformed, clients killed at random: none of it harms the others.

The long form, with a real policy and clients that are processes: benchmarks/serve_robustness.py.
"""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial

from benchmarks.serve_robustness import malformed
from tests.serve.robots import ROBOT, Summing, seen
from vlafit.serve import wire
from vlafit.serve.client import connect
from vlafit.serve.protocols import Request, pack_requests, read_chunks
from vlafit.types import EpisodeKey

REQUESTS, CLIENTS = 1200, 8
TOO_LARGE = 2**21  # bytes; the server reads half of it
SERVE = """
from tests.serve.robots import Summing, described
from vlafit.serve.options import Options
from vlafit.serve.server import run
actor = Summing()
run(actor, described(actor), Options(port=0, max_frame=2**20), lambda address: print(address, flush=True))
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def one_client(address: str, number: int, requests: int) -> tuple[int, int, int]:
    """Send requests, some malformed; break the connection now and then. Returns answers, refusals, breaks."""
    rng = np.random.default_rng(number)
    answers = refusals = breaks = 0
    connection: ClientConnection | None = None
    for i in range(requests):
        if connection is None:
            connection = dial(address, compression=None, max_size=None, proxy=None).__enter__()
            connection.recv(timeout=60)
        key = EpisodeKey(number, "pick", i)
        if rng.random() < 0.01:
            _, frame = malformed(rng, ROBOT, TOO_LARGE)
            try:
                connection.send(frame)
                if isinstance(connection.recv(timeout=60), str):
                    refusals += 1
            except ConnectionClosed:  # it was too large
                connection, refusals = None, refusals + 1
                continue
        picture = int(rng.integers(50))
        connection.send(pack_requests([Request(seen(picture), key)], ("front", "wrist")))
        if rng.random() < 0.01:  # killed while it waits
            connection.socket.shutdown(socket.SHUT_RDWR)
            connection.close()
            connection, breaks = None, breaks + 1
            continue
        answer = connection.recv(timeout=60)
        assert isinstance(answer, bytes), answer
        (chunk,) = read_chunks(wire.unpack(answer), 1, 3)
        (wanted,) = Summing().act([seen(picture)], [key])
        assert chunk.actions.tobytes() == wanted.actions.tobytes()
        answers += 1
    if connection is not None:
        connection.close()
    return answers, refusals, breaks


def test_every_good_request_is_answered_right_whatever_the_others_send(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server
    memory = []
    for part in range(4):
        with ThreadPoolExecutor(CLIENTS) as pool:
            share = REQUESTS // 4 // CLIENTS
            parts = pool.map(lambda n: one_client(address, n + 100 * part, share), range(CLIENTS))  # noqa: B023
            results = list(parts)
        assert sum(answers + breaks for answers, _, breaks in results) > 0.98 * share * CLIENTS
        memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
    print("server's memory in MiB after each quarter:", [round(m, 1) for m in memory])
    assert memory[-1] - memory[1] < 8, memory
    assert process.poll() is None
    with connect(address) as remote:
        remote.act([seen()], [EpisodeKey(0, "pick", 0)])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_garbage_on_the_port_is_no_connection(server: tuple[subprocess.Popen[str], str]) -> None:
    _, address = server
    port = int(re.sub(r".*:", "", address))
    for garbage in (
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 10**5,
    ):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            try:
                raw.sendall(garbage)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(4096):
                    pass
            except OSError:
                pass
    with connect(address) as remote:
        remote.act([seen()], [EpisodeKey(0, "pick", 0)])
