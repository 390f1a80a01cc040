"""Answer HTTP requests of other methods than GET, which websockets drops without a word.

What is no HTTP request at all is left to websockets, which ends the connection.
"""

from websockets.asyncio.server import ServerConnection

LONGEST_METHOD = 16  # characters; the longest registered one has 16
BODY = b"only GET is answered here: /, /healthz and /metrics\n"
NOT_ALLOWED = (
    b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\nConnection: close\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
CLOSES_S = 1.0  # after the answer, in which the client may still send its body


class Connection(ServerConnection):
    """A connection of the server, whose first bytes are looked at."""

    _begin: bytes | None = b""  # of the request, until its method is known
    _refused = False

    def data_received(self, data: bytes) -> None:
        """Refuse the request, or pass it on."""
        if self._refused:
            return
        if self._begin is not None:
            data = self._begin + data
            method, space, _ = data.partition(b" ")
            is_word = method.isalpha() and method.isupper() and len(method) <= LONGEST_METHOD
            if is_word and not space:
                self._begin = data
                return
            self._begin = None
            if is_word and method != b"GET":
                self._refuse(method)
                return
        super().data_received(data)

    def _refuse(self, method: bytes) -> None:
        self._refused = True
        self.transport.write(NOT_ALLOWED.partition(BODY)[0] if method == b"HEAD" else NOT_ALLOWED)
        self.loop.call_later(CLOSES_S, self.transport.close)
