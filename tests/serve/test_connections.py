"""A connection that is closed stays closed; one that breaks in an episode changes no action of it."""

import dataclasses
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.utils import accept_key

from tests.serve.robots import ROBOT, Continuing, Summing, described, seen
from tests.waiting import wait_until
from vlafit.errors import ConfigError, RemoteError
from vlafit.execution import Execution
from vlafit.serve import wire
from vlafit.serve.client import RemoteActor, connect
from vlafit.serve.control import Controller
from vlafit.serve.metadata import greeting
from vlafit.serve.server import Running
from vlafit.types import EpisodeKey, Feature, Observation

Serve = Callable[..., Running]
KEY = EpisodeKey(0, "pick", 0)
WORDS = seen().instruction


class Another(Continuing):
    def fingerprint(self) -> str:
        return "another"


def end(running: Running) -> int:
    """Stop a server; return the port that it had."""
    assert running.server is not None and running._loop is not None
    running.stop()
    wait_until(running._loop.is_closed)
    return running.server.port


def drop(remote: RemoteActor) -> None:
    """Break the connection as a network does."""
    remote._connection.socket.close()


def test_a_closed_client_refuses_and_connects_to_nobody(serve: Serve) -> None:
    running = serve(Continuing())
    with connect(running.address) as remote:
        remote.act([seen()], [KEY])
    for _ in range(2):
        with pytest.raises(RemoteError, match="this client is closed; connect anew"):
            remote.act([seen()], [KEY])
        with pytest.raises(RemoteError, match="this client is closed"):
            remote.act_guided([seen()], [KEY], [None])
        remote.close()
    wait_until(lambda: running.metrics.clients == 0)


def test_a_client_that_is_closed_while_it_waits_does_not_connect_again(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    actor = Summing()
    running = serve(actor)
    actor.open.clear()
    remote = connect(running.address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(remote.act, [seen()], [KEY])
        assert actor.asked.wait(10)
        remote.close()
        with pytest.raises(RemoteError, match="this client is closed"):
            waiting.result(timeout=10)
        actor.open.set()
    assert "connecting again" not in caplog.text


def test_a_closed_controller_refuses() -> None:
    for background in (False, True):
        control = Controller(Summing(), background=background)
        control.start(WORDS)
        control.step(seen().images, seen().state)
        control.close()
        for call in (lambda: control.step(seen().images, seen().state), lambda: control.start(WORDS)):  # noqa: B023
            with pytest.raises(ConfigError, match="the controller is closed"):
                call()


@pytest.mark.parametrize(
    "execution", [Execution("real_time", 2, 1), Execution("ensemble", 1), Execution(replan=3)]
)
def test_an_episode_goes_on_unchanged_when_the_server_was_started_anew(
    serve: Serve, caplog: pytest.LogCaptureFixture, execution: Execution
) -> None:
    sent = []
    for breaks in (False, True):
        running = serve(Continuing())
        with connect(running.address) as remote, Controller(remote, execution) as control:
            control.start(WORDS, seed=5)
            actions = []
            for i in range(12):
                if breaks and i == 5:
                    serve(Continuing(), port=end(running))
                if breaks and i == 9:
                    drop(remote)
                actions.append(control.step(seen(i).images, seen(i).state).tobytes())
            sent.append(actions)
    assert sent[0] == sent[1]
    lines = [r.getMessage() for r in caplog.records if "the connection broke" in r.getMessage()]
    assert len(lines) == 2 and all(line.endswith("connecting again") for line in lines)
    assert caplog.text.count("connected again, to the same policy. The episode goes on") == 2


def test_while_nobody_answers_every_call_is_an_error_and_the_break_is_said_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve()
    with connect(running.address) as remote:
        port = end(running)
        for _ in range(3):
            with pytest.raises(RemoteError, match="cannot be reached"):
                remote.act([seen()], [KEY])
        # what nobody knows yet is not said
        assert caplog.text.count("connecting again") == 1 and "goes on" not in caplog.text
        serve(port=port)
        got = remote.act([seen()], [KEY])[0]
        assert caplog.text.count("The episode goes on") == 1
    assert got.actions.tobytes() == Summing().act([seen()], [KEY])[0].actions.tobytes()


def test_another_policy_at_the_same_address_never_answers(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(Continuing())
    with connect(running.address) as remote:
        other = serve(Another(), port=end(running))
        for _ in range(3):  # the second call used to be answered
            with pytest.raises(
                RemoteError, match=r"another policy than before \(another, and it was summing 1\)"
            ):
                remote.act([seen()], [KEY])
    assert not other.metrics.answered and "goes on" not in caplog.text


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(serve().address) as remote:

        def interrupted(timeout: float) -> bytes:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(remote._connection, "recv", interrupted)
            with pytest.raises(KeyboardInterrupt):
                remote.act([seen(1)], [KEY])
        (got,) = remote.act([seen(2)], [KEY])
    assert got.actions.tobytes() == Summing().act([seen(2)], [KEY])[0].actions.tobytes()


def test_a_warning_is_logged_once_for_all_connections(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    one = seen()
    without = type(one)({"front": one.images["front"]}, one.state, one.instruction)
    with caplog.at_level(logging.WARNING, "vlafit.serve.client"), connect(serve().address) as remote:
        for _ in range(2):
            remote.act([without], [KEY])
            drop(remote)
        remote.act([without], [KEY])
    lines = [r.getMessage() for r in caplog.records if r.name == "vlafit.serve.client"]
    assert sum("'wrist' is missing" in line for line in lines) == 1


# ----------------------------------------------------------------------------------- servers that stand still


class Frozen:
    """A server that stops after its greeting: it keeps its connections, and reads and answers nothing."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        self._robot = dataclasses.replace(ROBOT, cameras=(Feature("front", (1024, 2048, 3)),))
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._greet, daemon=True)
        self._thread.start()

    def _greet(self) -> None:
        connection, _ = self._listener.accept()
        self._held.append(connection)
        asked = connection.recv(65536).decode()
        key = re.search(r"Sec-WebSocket-Key: (\S+)", asked, re.IGNORECASE)
        assert key
        said = dataclasses.replace(described(Summing()), embodiment=self._robot, required=("front",))
        frame = wire.pack(greeting(said) | {"timestamp": 0.0})
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + f"Sec-WebSocket-Accept: {accept_key(key[1])}\r\n\r\n".encode()
            + b"\x82\x7e"
            + len(frame).to_bytes(2, "big")
            + frame
        )

    def seen(self) -> Observation:
        return Observation({"front": np.zeros((1024, 2048, 3), np.uint8)}, seen().state, WORDS)

    def end(self) -> None:
        self._listener.close()
        for connection in self._held:
            connection.close()


@pytest.fixture
def frozen() -> Iterator[Frozen]:
    server = Frozen()
    yield server
    server.end()


# websockets itself waits 10 s for the end of a connection, and for ever for a frame to be taken
@pytest.mark.parametrize(("rows", "says"), [(0, "no answer"), (4, "took no request of 25[0-9]+ bytes")])
def test_a_server_that_stands_still_costs_no_more_than_the_time_out(
    frozen: Frozen, rows: int, says: str
) -> None:
    def asked() -> None:
        with connect(frozen.url, timeout_s=0.3) as remote:
            small = dataclasses.replace(frozen.seen(), images={})
            with pytest.raises(RemoteError, match=rf"{says} within 0\.3 s"):
                remote.act([frozen.seen()] * rows or [small], [KEY] * max(rows, 1))
            with pytest.raises(RemoteError, match="cannot be reached"):  # nobody accepts it
                remote.act([small], [KEY])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asked).result(timeout=5)


def test_a_client_that_stands_still_does_not_keep_a_server_from_ending(serve: Serve) -> None:
    running = serve(timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        wait_until(lambda: running.metrics.clients == 1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(end, running).result(timeout=5)
