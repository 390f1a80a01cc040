"""The server: connections, limits, and an end that loses no answer.

Every connection is a task of one event loop and has at most one frame in work, so that a client that is slow,
silent or malicious occupies its own connection and nothing else. The policy computes in a thread beside the
loop.
"""

import asyncio
import dataclasses
import hmac
import http
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from vlafit.errors import ConfigError, EmbodimentError, VlafitError, quoted
from vlafit.execution import Execution
from vlafit.serve import wire
from vlafit.serve.batcher import Batcher
from vlafit.serve.http_methods import Connection
from vlafit.serve.metadata import Described, greeting
from vlafit.serve.metrics import Metrics
from vlafit.serve.options import Options
from vlafit.serve.session import Session, WatchesStates
from vlafit.types import Actor

log = logging.getLogger(__name__)

STOPPING = "the server is stopping"
CLOSING_S = 2.0  # that a client has to answer the end of its connection


def require_executable(execution: Execution, described: Described) -> None:
    """Raise ConfigError where the policy's chunks cannot be executed so."""
    if execution.mode == "real_time" and not described.guided:
        raise ConfigError(
            "execution: real_time needs a policy that can continue a chunk (a flow-matching one), and this "
            "one cannot; choose chunk or ensemble"
        )
    if described.chunk:
        execution.require_chunk(described.chunk)
        if sentence := execution.shortened(described.chunk):
            log.warning("execution: %s", sentence)


def _require_camera(described: Described, key: str, target: str) -> None:
    try:
        described.embodiment.camera(target)
    except EmbodimentError as error:
        raise ConfigError(f"server: names (--map) {quoted(key)} = {quoted(target)}: {error}") from None


class Server:
    """Serves one actor until it is told to stop."""

    def __init__(self, actor: Actor, described: Described, options: Options) -> None:
        self.actor = actor
        self.described = described
        self.options = options
        self.metrics = Metrics()
        self.port = options.port
        self._greeting = greeting(dataclasses.replace(described, max_frame=options.max_frame))
        self._stop = asyncio.Event()
        self._busy: set[asyncio.Task[None]] = set()  # connections that have a frame in work
        for key, target in options.names.items():
            if target != "state":
                _require_camera(described, key, target)
        if options.execution is not None:
            require_executable(options.execution, described)

    async def run(self, ready: Callable[[str], None] = lambda address: None) -> None:
        """Serve until `stop`. `ready` is called with the address as soon as clients can connect.

        Raises ConfigError where the address cannot be listened at.
        """
        watching = self.actor if isinstance(self.actor, WatchesStates) and self.actor.logs_states else None
        try:
            if watching:
                watching.logs_states = False  # each client's session does, in the client's name
            await self._run(ready, self.options)
        finally:
            if watching:
                watching.logs_states = True

    async def _run(self, ready: Callable[[str], None], options: Options) -> None:
        self._batcher = Batcher(self.actor, self.described.width, self.metrics)
        try:
            server = await serve(
                self._connection,
                options.host,
                options.port,
                process_request=self._http,
                create_connection=Connection,
                origins=[None],  # no page in a browser may talk to a server on loopback
                compression=None,
                max_size=options.max_frame,
                max_queue=2,
                write_limit=2**20,
                close_timeout=min(CLOSING_S, options.timeout_s),
                ping_timeout=60.0,  # a client that loads a model, say, answers late
                server_header=None,
                logger=_quiet_logger(),
            )
        except OSError as error:
            await self._batcher.close()
            raise ConfigError(
                f"cannot listen at {options.host}:{options.port}: {error.strerror or error}; choose "
                "another --port"
            ) from error
        self.port = next(iter(server.sockets)).getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        ready(f"ws://{host}:{self.port}")
        try:
            await self._stop.wait()
        finally:
            await self._end(server)

    def stop(self) -> None:
        """Take no more requests, answer those in work, and let `run` return. Call it from the loop's
        thread."""
        self._stop.set()

    async def _end(self, server: WebsocketServer) -> None:
        """Wait for the answers in work, and close; until then the port still says that the server stops."""
        if self._busy:
            await asyncio.wait(self._busy, timeout=self.options.timeout_s)
        server.close(close_connections=False)
        closing = [asyncio.create_task(c.close(1001, STOPPING)) for c in list(server.connections)]
        if closing:
            await asyncio.wait(closing)
        await server.wait_closed()
        await self._batcher.close()

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer what is no websocket, and refuse who may not connect."""
        path = request.path.partition("?")[0]
        if path in ("/healthz", "/health"):  # vla-eval asks for the latter
            stopping = self._stop.is_set()
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if stopping else http.HTTPStatus.OK
            return connection.respond(status, f"{STOPPING}\n" if stopping else "ok\n")
        if self.options.token and (problem := self._token_problem(request)):
            self.metrics.refuse("token")
            text = f"{problem}; send the header Authorization: Api-Key TOKEN, once\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.text())
        if path != "/":
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        if self._stop.is_set():
            self.metrics.refuse("stopping")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{STOPPING}\n")
        if self.metrics.clients >= self.options.max_clients:
            self.metrics.refuse("clients")
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.options.max_clients} clients are connected already\n",
            )
        return None

    def _token_problem(self, request: HttpRequest) -> str:
        """Return what is wrong with the token of a request, without showing it; "" if it is the server's."""
        given = request.headers.get_all("Authorization")
        if not given:
            return "no token came"
        wanted = f"Api-Key {self.options.token}"
        sent = given[0].encode(errors="surrogateescape")
        if len(given) > 1 or not sent.startswith(b"Api-Key "):
            return "no token of the form Api-Key TOKEN came"
        return "" if hmac.compare_digest(sent, wanted.encode()) else "the token is not this server's"

    async def _connection(self, connection: ServerConnection) -> None:
        self.metrics.clients += 1
        task = asyncio.current_task()
        assert task is not None
        session = Session(self.described, self._batcher, self.metrics, self.options)
        bucket = _Bucket(self.options.max_rate)
        try:
            await self._send(connection, wire.pack(self._greeting | {"timestamp": time.time()}))
            async for frame in connection:
                self._busy.add(task)
                answer = STOPPING if self._stop.is_set() else await session.answer(frame)
                if answer is not None:
                    await self._send(connection, answer)
                self._busy.discard(task)
                if self._stop.is_set():
                    await connection.close(1001, STOPPING)
                    return
                await bucket.take()
        except ConnectionClosed:
            pass
        except TimeoutError:
            self.metrics.refuse("slow")
            connection.transport.abort()
        except Exception:  # an internal error only costs this client its connection
            log.exception("a connection ended in an error")
            self.metrics.refuse("internal")
        finally:
            self._busy.discard(task)
            self.metrics.clients -= 1

    async def _send(self, connection: ServerConnection, answer: bytes | str) -> None:
        async with asyncio.timeout(self.options.timeout_s):
            await connection.send(answer)


class _Bucket:
    """Lets `rate` frames a second pass on average, and as many at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = max(rate, 1.0)
        self._at = time.monotonic()

    async def take(self) -> None:
        now = time.monotonic()
        self._left = min(max(self._rate, 1.0), self._left + (now - self._at) * self._rate) - 1
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)


def _quiet_logger() -> logging.Logger:
    """Return a logger for websockets' own lines: whoever scans a port must not fill the log with
    tracebacks."""
    logger = logging.getLogger("vlafit.serve.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


def run(
    actor: Actor, described: Described, options: Options, ready: Callable[[str], None] = lambda address: None
) -> None:
    """Serve `actor` until SIGTERM or SIGINT, then answer what is in work and return."""

    async def main() -> None:
        server = Server(actor, described, options)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        await server.run(ready)

    asyncio.run(main())


@contextmanager
def serving(actor: Actor, described: Described, options: Options) -> Iterator["Running"]:
    """Serve `actor` in a thread while the block runs, for tests, benchmarks and notebooks."""
    running = Running()
    thread = threading.Thread(
        target=running.main, args=(actor, described, options), name="vlafit-server", daemon=True
    )
    thread.start()
    running.started.wait()
    if running.error is not None:
        thread.join()
        raise running.error
    try:
        yield running
    finally:
        running.stop()
        thread.join()


class Running:
    """A server that runs in another thread."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.error: Exception | None = None
        self.address = ""
        self.server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def main(self, actor: Actor, described: Described, options: Options) -> None:
        """Run the server in the thread that calls this."""

        def ready(address: str) -> None:
            self.address = address
            self.started.set()

        async def serve_here() -> None:
            self._loop = asyncio.get_running_loop()
            self.server = Server(actor, described, options)
            await self.server.run(ready)

        try:
            asyncio.run(serve_here())
        except VlafitError as error:
            self.error = error
            self.started.set()

    def stop(self) -> None:
        """Let the server answer what is in work, and end."""
        if self._loop is not None and self.server is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.server.stop)

    @property
    def metrics(self) -> Metrics:
        """The server's counters so far."""
        assert self.server is not None
        return self.server.metrics
