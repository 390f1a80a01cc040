"""Run a queue of episodes: assign them to environment slots, batch policy calls, yield the outcomes.

Timing decides which episodes run together, but never the result of one. Nothing here writes files.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.envs.messages import Moved, Play, Reset
from vlafit.errors import EmbodimentError, SimulationError
from vlafit.execution import Execution, Plan, executable
from vlafit.rollout.env_pool import Advanced, Broken, EnvPool, EnvSlot, Interrupted
from vlafit.rollout.protocol import Protocol
from vlafit.types import ActionChunk, Actor, EpisodeKey, GuidedActor, Observation, history_of


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to run. `instruction` is the sentence the actor gets, which may be another task's."""

    task: str
    trial: int
    seed: int
    instruction: str
    film: bool


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. `success` is None if and only if the environment failed, see `error`."""

    request: EpisodeRequest
    success: bool | None
    steps: int
    replans: int
    wall_s: float
    error: str | None
    frames: tuple[NDArray[np.uint8], ...]  # of the whole episode, if it was filmed
    invalid_answers: int | None  # of a policy that answers with tokens: those that made no chunk
    action_change: float | None  # mean |a[t] - a[t-1]| over dimensions and steps; None below two steps


@dataclass
class _Episode:
    request: EpisodeRequest
    started: float
    plan: Plan
    newest: deque[Observation]  # as many observations as the actor reads, the newest last
    steps: int = 0
    replans: int = 0
    waits: bool = False  # for actions
    sent: NDArray[np.float32] | None = None  # the actions of the command in progress
    last: NDArray[np.float32] | None = None  # the last executed action
    change: float = 0.0  # sum over steps
    invalid: int | None = None  # answers whose tokens made no chunk
    frames: list[NDArray[np.uint8]] = dataclasses.field(default_factory=list)

    @property
    def observation(self) -> Observation:
        """The newest observation with those before it, of which there are fewer at the start."""
        *past, newest = self.newest
        return dataclasses.replace(newest, past=tuple(past)) if past else newest

    def advance(self, moved: Moved) -> None:
        """Take over what the last command did."""
        for observation in (*moved.earlier, moved.observation):
            self.newest.append(dataclasses.replace(observation, instruction=self.request.instruction))
        if self.sent is not None:
            executed = self.sent[: moved.steps]
            before = executed[:1] if self.last is None else self.last[None]
            self.change += float(np.abs(np.diff(executed, axis=0, prepend=before)).mean(axis=1).sum())
            self.last = executed[-1]
        self.steps += moved.steps
        self.frames += moved.frames
        self.waits = True

    def end(self, success: bool | None, error: str | None = None) -> Outcome:
        wall_s = round(time.monotonic() - self.started, 3)
        change = round(self.change / (self.steps - 1), 6) if self.steps > 1 else None
        frames = tuple(self.frames)
        counts = (self.steps, self.replans)
        return Outcome(self.request, success, *counts, wall_s, error, frames, self.invalid, change)


class _Queue:
    """Episodes by task. A slot stays with its task if possible, because a new task loads another scene.

    `in_order`: the episodes are taken in their order instead.
    """

    def __init__(self, requests: Sequence[EpisodeRequest], in_order: bool) -> None:
        self._requests: dict[str, list[EpisodeRequest]] = {}
        for request in requests:
            self._requests.setdefault("" if in_order else request.task, []).append(request)
        self._in_order = in_order
        self._tasks: dict[EnvSlot, str] = {}

    def take(self, slot: EnvSlot) -> EpisodeRequest | None:
        task = "" if self._in_order else self._tasks.get(slot, "")
        if not self._requests.get(task):
            waiting = [name for name, requests in self._requests.items() if requests]
            if not waiting:
                return None
            running = list(self._tasks.values())
            task = max(waiting, key=lambda name: len(self._requests[name]) / (1 + running.count(name)))
        self._tasks[slot] = task
        return self._requests[task].pop(0)

    def put_back(self, request: EpisodeRequest) -> None:
        self._requests["" if self._in_order else request.task].insert(0, request)


@dataclass(frozen=True)
class PlayOptions:
    """How episodes are run: dimensions of an action, episodes in one call of the actor, needs of images.

    `in_order`: episodes begin in their order, although a process then has to load other scenes more often.
    """

    action_dim: int
    width: int
    images: bool
    execution: Execution
    in_order: bool = False


def play(
    actor: Actor,
    protocol: Protocol,
    requests: Sequence[EpisodeRequest],
    pool: EnvPool,
    options: PlayOptions,
) -> Iterator[Outcome]:
    """Run every episode once and yield its outcome when it ends.

    The actor is called with up to `options.width` episodes: as soon as that many wait for an action, no
    further one can arrive, or none arrived for a while. An episode whose environment raised, died or hung is
    yielded as an error and never repeated. Other episodes in the same process start again, with the same
    result.
    """
    queue = _Queue(requests, options.in_order)
    history = history_of(actor)
    running: dict[EnvSlot, _Episode] = {}

    def start_next(slot: EnvSlot) -> None:
        request = queue.take(slot)
        if request is not None:
            running[slot] = _Episode(
                request, time.monotonic(), Plan(options.execution), deque(maxlen=history)
            )
            pool.send(
                slot,
                Reset(
                    slot.index,
                    request.task,
                    request.seed,
                    protocol.settle_steps,
                    protocol.settle_action,
                    protocol.start_steps,
                    options.images,
                    request.film,
                ),
            )

    for slot in pool.slots:
        start_next(slot)
    while running:
        waiting = [slot for slot, episode in running.items() if episode.waits]
        batch_ready = len(waiting) >= options.width or not pool.busy
        events = [] if waiting and batch_ready else pool.wait()
        if waiting and not events:  # a full batch, or the episodes that wait behind a slow one
            episodes = {slot: running[slot] for slot in waiting[: options.width]}
            _act(actor, protocol, pool, episodes, options, history)
        for event in events:
            episode = running.get(event.slot)
            if episode is None:
                continue  # an idle slot of a process that was replaced
            match event:
                case Advanced(moved=moved):
                    episode.advance(moved)
                    if moved.success or moved.truncated or episode.steps >= protocol.horizon:
                        yield episode.end(moved.success)
                        del running[event.slot]
                        start_next(event.slot)
                case Broken(text=text):
                    yield episode.end(None, text)
                    del running[event.slot]
                    start_next(event.slot)
                case Interrupted():
                    queue.put_back(episode.request)
                    del running[event.slot]
                    start_next(event.slot)


def _act(
    actor: Actor,
    protocol: Protocol,
    pool: EnvPool,
    episodes: Mapping[EnvSlot, _Episode],
    options: PlayOptions,
    history: int,
) -> None:
    observations = [episode.observation for episode in episodes.values()]
    keys = [EpisodeKey(e.request.seed, e.request.task, e.replans) for e in episodes.values()]
    committed = [e.plan.committed() for e in episodes.values()]
    if any(left is not None for left in committed) and isinstance(actor, GuidedActor):
        chunks = actor.act_guided(observations, keys, committed)
    else:
        chunks = actor.act(observations, keys)
    if len(chunks) != len(keys):
        raise SimulationError(f"the actor returned {len(chunks)} chunks for {len(keys)} observations")
    for (slot, episode), chunk in zip(episodes.items(), chunks, strict=True):
        left = protocol.horizon - episode.steps
        actions = _checked(chunk, episode.request, options.action_dim)
        actions = episode.plan.extend(ActionChunk(actions))[:left]
        episode.waits, episode.sent = False, actions
        episode.replans += 1
        if chunk.valid is not None:
            episode.invalid = (episode.invalid or 0) + (not chunk.valid)
        render = options.images and len(actions) < left
        pool.send(slot, Play(slot.index, actions, render, episode.request.film, history))


def _checked(chunk: ActionChunk, request: EpisodeRequest, action_dim: int) -> NDArray[np.float32]:
    """Return the chunk's actions. Invalid ones raise: they are a broken policy, not a failed episode."""
    try:
        return executable(chunk.actions, action_dim)
    except EmbodimentError as error:
        raise SimulationError(f"task {request.task!r}, seed {request.seed}: {error}") from None
