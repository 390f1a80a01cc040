"""One connection: which protocol it speaks, which episode it is in, and the answer to each of its frames."""

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.state_watch import StateWatch
from vlafit.errors import VlafitError
from vlafit.execution import Execution, InvalidAnswers, Plan, executable
from vlafit.requests import Request
from vlafit.serve import protocols, wire
from vlafit.serve.batcher import Batcher
from vlafit.serve.metadata import Described
from vlafit.serve.metrics import Metrics
from vlafit.serve.options import Options
from vlafit.serve.protocols import Fit, Name, as_sent
from vlafit.serve.resizing import Resizing
from vlafit.serve.wire import WireError
from vlafit.types import ActionChunk, EpisodeKey, Observation

log = logging.getLogger(__name__)


@runtime_checkable
class WatchesStates(Protocol):
    """An actor that knows which states its policy was trained on."""

    logs_states: bool
    """Whether it logs unusual states itself."""

    def state_watch(self) -> StateWatch:
        """Return a new watch."""
        ...


class Session:
    """The state of one connection."""

    def __init__(self, described: Described, batcher: Batcher, metrics: Metrics, options: Options) -> None:
        self._described = described
        self._batcher = batcher
        self._metrics = metrics
        self._options = options
        self._key = EpisodeKey(0, "", 0)  # of the next request, where frames hold none
        self._episodes = 0
        self._plan: Plan | None = None
        self._actions: deque[NDArray[np.float32]] = deque()  # to be sent before the policy is asked again
        self._newest: deque[Observation] = deque(maxlen=described.history)  # of vla-eval's episode
        self._tally = InvalidAnswers()
        self._missing: set[str] = set()  # cameras whose absence was logged
        self._resized: list[str] = []  # sentences about frames that were scaled, for the next answer
        self._fit: Fit = Resizing(self._resize) if options.resize else as_sent
        actor = batcher.actor
        self._watch = actor.state_watch() if isinstance(actor, WatchesStates) else None

    async def answer(self, frame: bytes | str) -> bytes | str | None:
        """Return the answer to a frame: bytes, a text that says what is wrong with it, or None where none is
        due.

        Nothing that a frame holds raises.
        """
        began = time.perf_counter()
        name: Name = "openpi"
        values: Any = None
        try:
            if isinstance(frame, str):
                raise WireError("a text frame; send binary frames of msgpack")
            values = wire.unpack(frame)
            name = protocols.protocol_of(values)
            async with asyncio.timeout(self._options.timeout_s):
                answer = await self._dispatch(name, values, began)
            if answer is not None:
                self._metrics.answer(name, time.perf_counter() - began)
            return answer
        except TimeoutError:
            return self._refuse(name, values, "timeout", f"no answer within {self._options.timeout_s:g} s")
        except WireError as error:
            return self._refuse(name, values, "frame", str(error))
        except VlafitError as error:
            return self._refuse(name, values, "observation", str(error))

    def _refuse(self, name: Name, values: Any, reason: str, text: str) -> bytes | str:
        self._metrics.refuse(reason)
        if name == "vla-eval":
            return protocols.pack_vla_eval("error", {"error": text}, values["seq"])
        return text

    async def _dispatch(self, name: Name, values: Mapping[Any, Any], began: float) -> bytes | None:
        match name:
            case "vlafit":
                requests = protocols.read_requests(values, self._described)
                unusual = [text for request in requests for text in self._unusual_states(request)]
                chunks = await self._act(requests)
                missing = [text for request in requests for text in self._missing_cameras(request)]
                self._invalid_answers(chunks)  # whose `valid` says so
                return protocols.pack_chunks(chunks, [*missing, *unusual])
            case "openpi":
                names = self._options.names
                request = protocols.read_openpi(values, self._described, names, self._key, self._fit)
                unusual = self._unusual_states(request)
                (chunk,) = await self._act([request])
                warnings = [*self._resized, *self._missing_cameras(request), *unusual]
                warnings += self._invalid_answers([chunk])
                self._resized.clear()
                self._key = dataclasses.replace(self._key, replan=self._key.replan + 1)
                return protocols.pack_openpi(chunk, (time.perf_counter() - began) * 1000, warnings)
            case "vla-eval":
                return await self._vla_eval(values)

    async def _vla_eval(self, values: Mapping[Any, Any]) -> bytes | None:
        """Answer one message; the frame that greets every client was the answer to "hello"."""
        payload = values["payload"]
        if values["type"] == "episode_start":
            self._key = protocols.episode_of(payload, self._episodes)
            self._episodes += 1
            self._plan, self._actions = None, deque()
            self._newest.clear()
        if values["type"] != "observation":
            return None
        if self._plan is None:
            self._plan = Plan(self._options.execution or Execution(replan=self._described.chunk or 1))
        names = self._options.names
        request = protocols.read_vla_eval(payload, self._described, names, self._key, self._fit)
        self._unusual_states(request)
        before = tuple(self._newest)
        self._newest.append(request.observation)
        if not self._actions:
            seen = dataclasses.replace(request.observation, past=tuple(self._newest)[:-1])
            request = Request(seen, self._key, self._plan.committed())
            try:
                (chunk,) = await self._act([request])
            except BaseException:
                self._newest.clear()
                self._newest.extend(before)  # nothing was executed; it comes again
                raise
            self._missing_cameras(request)
            self._invalid_answers([chunk])
            self._key = dataclasses.replace(self._key, replan=self._key.replan + 1)
            self._actions = deque(self._plan.extend(chunk))
        return protocols.pack_vla_eval("action", {"actions": self._actions.popleft()}, values["seq"])

    async def _act(self, requests: Sequence[Request]) -> list[ActionChunk]:
        """Return the policy's chunks. Raises EmbodimentError for what no robot may be sent."""
        dimensions = self._described.embodiment.action.shape[0]
        chunks = await self._batcher.act(self, requests)
        return [dataclasses.replace(chunk, actions=executable(chunk.actions, dimensions)) for chunk in chunks]

    def _missing_cameras(self, request: Request) -> list[str]:
        """Log and return, once for each, cameras without which the policy has acted (it may refuse to)."""
        sentences = []
        required = self._described.required
        if not set(required) & set(request.observation.images):
            required = ()  # the policy refuses to act on nothing that it sees
        for name in required:
            if name not in request.observation.images and name not in self._missing:
                self._missing.add(name)
                sentences.append(f"camera {name!r} is missing; the policy acts without it from now on")
        return self._say("camera", sentences)

    def _resize(self, sentences: Sequence[str]) -> None:
        """Log that a camera's frames are scaled."""
        self._resized += self._say("camera", list(sentences))

    def _unusual_states(self, request: Request) -> list[str]:
        """Log and return, once for each dimension, states far outside the statistics."""
        return self._say("state", self._watch.sentences(request.observation.state) if self._watch else [])

    def _invalid_answers(self, chunks: Sequence[ActionChunk]) -> list[str]:
        """Count answers that are no chunk of actions; return a sentence for each.

        The actor logs them, so they are not logged here.
        """
        sentences = []
        for chunk in chunks:
            if sentence := self._tally.sentence(chunk, self._described.fate_of_invalid):
                sentences.append(sentence)
        self._metrics.warn("answer", len(sentences))
        return sentences

    def _say(self, kind: str, sentences: list[str]) -> list[str]:
        self._metrics.warn(kind, len(sentences))
        for sentence in sentences:
            log.warning("a client's %s", sentence)
        return sentences
