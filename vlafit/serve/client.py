"""A remote policy as an actor: the same calls as a local one, and the same bytes.

Nothing here imports torch: it is what runs on a robot.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, TypeVar

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_connection

from vlafit import arguments
from vlafit.agreement import Learned
from vlafit.config import LONGEST_S
from vlafit.credentials import checked_token, checked_url
from vlafit.errors import LONGEST_LINE, RemoteError, brief, shown_url
from vlafit.requests import Expected, Request, checked_requests
from vlafit.serve import protocols, wire
from vlafit.serve.metadata import Described, read_greeting
from vlafit.types import ActionChunk, Committed, Embodiment, EpisodeKey, Observation

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSING_S = 0.5  # that a server has to answer the end of a connection
LEAST_S = 1e-3  # of a wait: 0 would be for ever


def _left(until: float) -> float:
    """Return how long there is to wait until a time of the monotonic clock."""
    return max(LEAST_S, until - time.monotonic())


class RemoteActor:
    """Acts through a server of `vlafit serve`. Close it, or use it as a context manager.

    Calls may come from several threads; they take turns. A connection that breaks is made once more, and the
    request repeated: what it returns is decided by its key. One that was closed stays closed. A request takes
    at most `timeout_s`, connecting again included, and what is left of a connection up to 0.5 s more.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float = 30.0) -> None:
        self.url = shown_url(checked_url(url))
        """The server's address, without a query."""
        self._address = url
        self._token = checked_token(token)
        self._timeout_s = arguments.number("timeout_s", timeout_s, 0, LONGEST_S, above=True)
        self._turn = threading.Lock()
        self._closed = self._is_lost = False
        self._said: set[str] = set()  # what servers warned of
        self._connection, self._described = self._open(time.monotonic() + self._timeout_s)
        self.embodiment: Embodiment = self._described.embodiment
        self.width: int = self._described.width
        self.history: int = self._described.history
        self.chunk: int = self._described.chunk
        self.seeds = self._described.seeds

    @property
    def described(self) -> Described:
        """The server's description of its policy."""
        return self._described

    @property
    def expected(self) -> Expected:
        """What it can be asked, the cameras that it looks at among it."""
        return self._described.expected

    @property
    def learned(self) -> Learned:
        """What the policy says of the data that it learned from."""
        return self._described.learned

    @property
    def relative(self) -> tuple[bool, ...] | None:
        """For each action dimension, whether it was learned relative to the state; None: not known."""
        return self._described.relative

    def fingerprint(self) -> str:
        """Return what decides the actions; the same as the served actor's own."""
        return self._described.fingerprint

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one chunk [t, a] for each observation, in order.

        Raises EmbodimentError or ConfigError for what a local policy refuses, too, and RemoteError where the
        server refuses one or does not answer.
        """
        return self._answers(checked_requests(observations, keys, None, self.expected))

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        """Return one chunk for each observation that continues what is committed there."""
        return self._answers(checked_requests(observations, keys, committed, self.expected))

    def _answers(self, requests: Sequence[Request]) -> list[ActionChunk]:
        chunks: list[ActionChunk] = []
        for some in protocols.in_frames(requests, self._described):
            frame = protocols.pack_requests(some, self._described.required)
            with self._turn:
                answer = self._ask(frame)
                chunks += protocols.read_chunks(answer, len(some), self.embodiment.action.shape[0])
            for sentence in protocols.read_warnings(answer):
                if sentence not in self._said:  # a new connection is warned anew
                    self._said.add(sentence)
                    log.warning("%s: %s", self.url, sentence)
        return chunks

    def close(self) -> None:
        """Close the connection for good: later calls raise RemoteError."""
        self._closed = True
        self._connection.close()

    def __enter__(self) -> "RemoteActor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, frame: bytes) -> Any:
        self._require_open()
        until = time.monotonic() + self._timeout_s
        try:
            answer = self._exchange(frame, until)
        except ConnectionClosed as error:
            self._require_open()  # another thread may have closed it
            if error.rcvd is not None and error.rcvd.code == 1009:  # the same frame would be too large again
                raise RemoteError(
                    f"{self.url}: {len(frame)} bytes are more than the server reads at once; serve with a "
                    "larger --max-frame"
                ) from error
            self._connect_again(error, until)
            try:
                answer = self._exchange(frame, until)
            except ConnectionClosed as again:
                self._require_open()
                raise RemoteError(f"{self.url}: the connection broke twice: {again}") from again
        if isinstance(answer, str):
            raise RemoteError(f"{self.url}: {answer[:LONGEST_LINE]}")
        return wire.unpack(answer)

    def _connect_again(self, broken: ConnectionClosed, until: float) -> None:
        """Connect anew to the same policy. That it broke is said once for each time that it does."""
        if not self._is_lost:
            self._is_lost = True
            log.warning("%s: the connection broke (%s); connecting again", self.url, broken)
        connection, described = self._open(until)
        is_same = described.fingerprint == self._described.fingerprint
        if self._closed or not is_same:
            connection.close()
            self._require_open()
            raise RemoteError(
                f"{self.url}: serves another policy than before ({described.fingerprint}, and it was "
                f"{self._described.fingerprint}); connect anew"
            ) from broken
        self._connection, self._is_lost = connection, False
        log.warning(
            "%s: connected again, to the same policy. The episode goes on: every request holds its key and "
            "the chunk that is being executed",
            self.url,
        )

    def _require_open(self) -> None:
        if self._closed:
            raise RemoteError(f"{self.url}: this client is closed; connect anew (vlafit.connect)") from None

    def _exchange(self, frame: bytes, until: float) -> bytes | str:
        connection = self._connection
        try:
            self._send(connection, frame, until)
            return connection.recv(timeout=_left(until))
        except TimeoutError as error:
            connection.close()  # a late answer must not be taken for that of the next request
            raise RemoteError(f"{self.url}: no answer within {self._timeout_s:g} s") from error
        except (ConnectionClosed, RemoteError):
            raise
        except BaseException:  # Ctrl-C, of which the robot's program may make a pause
            connection.close()
            raise

    def _send(self, connection: ClientConnection, frame: bytes, until: float) -> None:
        """Send a frame. A server that reads nothing takes no large one: that is an error in time, too."""
        is_open = connection.close_code is None
        try:
            with suppress(OSError):  # of a socket that is closed, as `send` then says
                connection.socket.settimeout(_left(until))
            connection.send(frame)
        except ConnectionClosed as error:
            if is_open and isinstance(error.__cause__, TimeoutError):
                raise RemoteError(
                    f"{self.url}: the server took no request of {len(frame)} bytes within "
                    f"{self._timeout_s:g} s"
                ) from error
            raise

    def _open(self, until: float) -> tuple[ClientConnection, Described]:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        made = ExitStack()  # websockets connects when its context is entered
        connection = self._reach(
            lambda: made.enter_context(
                open_connection(
                    self._address,
                    logger=_quiet_logger(),
                    additional_headers=headers,
                    compression=None,
                    max_size=None,
                    open_timeout=_left(until),
                    close_timeout=min(CLOSING_S, self._timeout_s),
                    proxy=None,
                )
            )
        )
        try:
            frame = connection.recv(timeout=_left(until))
        except (TimeoutError, ConnectionClosed) as error:
            connection.close()
            raise RemoteError(
                f"{self.url}: connected, but no description of a policy came: {error}"
            ) from error
        if isinstance(frame, str):
            connection.close()
            raise RemoteError(f"{self.url}: {frame[:LONGEST_LINE]}")
        return connection, read_greeting(wire.unpack(frame), self.url)

    def _reach(self, attempt: Callable[[], T]) -> T:
        try:
            return attempt()
        except InvalidURI:
            raise RemoteError(f"url {self.url!r} is no address of a server; write ws://HOST:PORT") from None
        except InvalidStatus as error:
            body = (error.response.body or b"").decode(errors="replace").strip()[:LONGEST_LINE]
            raise RemoteError(f"{self.url}: refused ({error.response.status_code}): {body}") from error
        except UnicodeError as error:
            raise RemoteError(f"{self.url}: is the name of no machine: {brief(error)}") from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise RemoteError(
                f"{self.url}: cannot be reached ({error}); is `vlafit serve` running there?"
            ) from error


def _quiet_logger() -> logging.Logger:
    """Return a logger for websockets' own lines, which would show the token to whoever logs for debugging."""
    logger = logging.getLogger("vlafit.serve.client.websockets")
    logger.setLevel(logging.INFO)
    return logger


def connect(url: str, *, token: str = "", timeout_s: float = 30.0, wait_s: float = 0.0) -> RemoteActor:
    """Connect to a server of `vlafit serve` and return its policy as an actor.

    `url` is ``ws://HOST:PORT`` (or ``wss://`` behind a proxy that encrypts); `wait_s` is how long to try
    again while nothing answers, and `timeout_s` how long a request may take. White space around `token`, such
    as the line break at the end of its file, is left out. Raises RemoteError, and ConfigError for what can be
    no token.
    """
    until = time.monotonic() + arguments.number("wait_s", wait_s, 0, LONGEST_S)
    while True:
        try:
            return RemoteActor(url, token, timeout_s)
        except RemoteError as error:
            if time.monotonic() > until or not isinstance(error.__cause__, OSError):
                raise
            time.sleep(0.2)
