"""Gather the requests of all clients into calls of the policy, each client in its turn.

While one call is computed the next gathers. Clients that ask again as soon as they are answered would fall
into two halves that wait for one another's calls, so a call waits a little for those of the last one that did
so before; nobody waits for others. What one request gets wrong is its own error: a call that fails is
repeated row by row.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from vlafit.errors import RemoteError, VlafitError
from vlafit.requests import Request
from vlafit.serve.metrics import Metrics
from vlafit.types import ActionChunk, Actor, GuidedActor

log = logging.getLogger(__name__)

SHARE, LONGEST_WAIT_S = 0.5, 0.02  # of the last call's time, and at most: what "at once" means
INTERNAL = "the policy failed; the server's log says why"


@dataclass(frozen=True, eq=False)
class _Row:
    request: Request
    answer: "asyncio.Future[ActionChunk]"
    since: float


@dataclass
class _Pace:
    """When a client was answered last, and whether it asked again at once the last time."""

    answered: float = 0.0
    asks_at_once: bool = False


class Batcher:
    """Calls `actor` in a thread of its own with up to `width` requests at a time."""

    def __init__(self, actor: Actor, width: int, metrics: Metrics) -> None:
        self.actor = actor
        self.width = width
        self.metrics = metrics
        self._waiting: dict[object, deque[_Row]] = {}  # by client, in order of their turns
        self._last: list[object] = []  # clients of the last call
        self._paces: WeakKeyDictionary[object, _Pace] = WeakKeyDictionary()
        self._patience_s = 0.0
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "vlafit-policy")
        self._task = asyncio.create_task(self._run())

    async def act(self, client: object, requests: Sequence[Request]) -> list[ActionChunk]:
        """Return the chunks of one client's requests, or raise the first error among them."""
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        rows = [_Row(request, loop.create_future(), now) for request in requests]
        if (pace := self._paces.get(client)) is not None:
            pace.asks_at_once = now - pace.answered <= self._patience_s
        self._waiting.setdefault(client, deque()).extend(rows)
        self._wake.set()
        try:
            answers = await asyncio.gather(*(row.answer for row in rows), return_exceptions=True)
        finally:
            for row in rows:  # of a client that went away
                row.answer.cancel()
        chunks: list[ActionChunk] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            chunks.append(answer)
        return chunks

    async def close(self) -> None:
        """Stop when the call in progress has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            await self._gather()
            rows = self._take()
            if not rows:
                self._wake.clear()
                continue
            began = time.perf_counter()
            answers = await loop.run_in_executor(self._thread, self._act, [row.request for row in rows])
            ended = time.perf_counter()
            self._patience_s = min(SHARE * (ended - began), LONGEST_WAIT_S)
            for client in self._last:
                self._paces.setdefault(client, _Pace()).answered = ended
            self.metrics.call(ended - began, [began - row.since for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                if row.answer.done():
                    continue
                if isinstance(answer, BaseException):
                    row.answer.set_exception(answer)
                else:
                    row.answer.set_result(answer)

    async def _gather(self) -> None:
        """Wait for the clients of the last call that ask again at once, until patience ends."""
        expected = {client for client in self._last if self._paces[client].asks_at_once}
        until = time.perf_counter() + self._patience_s
        while len(self._waiting) < self.width and not expected <= self._waiting.keys():
            self._wake.clear()
            try:
                async with asyncio.timeout(until - time.perf_counter()):
                    await self._wake.wait()
            except TimeoutError:
                self._wake.set()  # those that wait are waited with no longer
                return

    def _take(self) -> list[_Row]:
        """Take up to `width` rows, one a client and turn; clients that are not served whole wait in front."""
        rows: list[_Row] = []
        self._last = []
        while self._waiting and len(rows) < self.width:
            client, queue = next(iter(self._waiting.items()))
            del self._waiting[client]
            while queue and queue[0].answer.done():
                queue.popleft()
            if queue:
                rows.append(queue.popleft())
                self._last.append(client)
            if queue:
                self._waiting[client] = queue  # behind the others
        return rows

    def _act(self, requests: Sequence[Request]) -> list[ActionChunk | Exception]:
        try:
            return list(self._call(requests))
        except Exception as error:  # of one observation, perhaps: it must not cost the others their answers
            if len(requests) > 1:
                return [answer for request in requests for answer in self._act([request])]
            if isinstance(error, VlafitError):
                return [error]
            log.exception("the policy failed")
            return [RemoteError(INTERNAL)]

    def _call(self, requests: Sequence[Request]) -> list[ActionChunk]:
        observations = [request.observation for request in requests]
        keys = [request.key for request in requests]
        committed = [request.committed for request in requests]
        if any(one is not None for one in committed) and isinstance(self.actor, GuidedActor):
            chunks = self.actor.act_guided(observations, keys, committed)
        else:
            chunks = self.actor.act(observations, keys)
        if len(chunks) != len(requests):
            raise RuntimeError(f"the actor was asked for {len(requests)} chunks and returned {len(chunks)}")
        return chunks
