"""Playing a queue of episodes: who sits where, who waits for an action, what became of each episode.

Which episodes are played together depends on timing; what happens in one does not. Nothing here writes files.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import SimulationError
from vlafit.rollout.pool import Advanced, Broken, Interrupted, Pool, Seat
from vlafit.rollout.protocol import Protocol
from vlafit.rollout.worker import Moved, Play, Reset
from vlafit.types import ActionChunk, Actor, EpisodeKey, Observation


@dataclass(frozen=True)
class Job:
    """An episode to play. `instruction` is the sentence the actor gets, which need not be the task's own."""

    task: str
    trial: int
    seed: int
    instruction: str
    film: bool


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. `success` is None if and only if `error` tells how its environment broke."""

    job: Job
    success: bool | None
    steps: int
    replans: int
    wall_s: float
    error: str | None
    frames: tuple[NDArray[np.uint8], ...]  # of the whole episode, if it was filmed


@dataclass
class _Episode:
    job: Job
    started: float
    steps: int = 0
    replans: int = 0
    observation: Observation | None = None  # set while it waits for an action
    frames: list[NDArray[np.uint8]] = dataclasses.field(default_factory=list)

    def end(self, success: bool | None, error: str | None = None) -> Outcome:
        wall_s = round(time.monotonic() - self.started, 3)
        return Outcome(self.job, success, self.steps, self.replans, wall_s, error, tuple(self.frames))


class _Queue:
    """Jobs by task. A seat keeps to its task while it can: changing tasks means loading another scene."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs: dict[str, list[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.task, []).append(job)
        self._seated: dict[Seat, str] = {}

    def take(self, seat: Seat) -> Job | None:
        task = self._seated.get(seat, "")
        if not self._jobs.get(task):
            waiting = [t for t, jobs in self._jobs.items() if jobs]
            if not waiting:
                return None
            at = list(self._seated.values())
            task = max(waiting, key=lambda t: len(self._jobs[t]) / (1 + at.count(t)))
        self._seated[seat] = task
        return self._jobs[task].pop(0)

    def put_back(self, job: Job) -> None:
        self._jobs[job.task].insert(0, job)


def play(
    actor: Actor,
    protocol: Protocol,
    jobs: Sequence[Job],
    pool: Pool,
    *,
    action_dim: int,
    width: int,
    images: bool,
) -> Iterator[Outcome]:
    """Play every job once and yield its outcome when it ends.

    The actor is asked for up to `width` episodes at a time: as soon as so many wait for an action, nothing
    else can come, or nothing did for a while. An episode whose environment raised, died or hung is yielded as
    an error and never repeated; those that merely shared its process start again, which cannot change what
    happens in them.
    """
    queue = _Queue(jobs)
    playing: dict[Seat, _Episode] = {}

    def begin(seat: Seat) -> None:
        job = queue.take(seat)
        if job is not None:
            playing[seat] = _Episode(job, time.monotonic())
            pool.send(
                seat,
                Reset(
                    seat.slot,
                    job.task,
                    job.seed,
                    protocol.settle_steps,
                    protocol.settle_action,
                    images,
                    job.film,
                ),
            )

    for seat in pool.seats:
        begin(seat)
    while playing:
        waiting = [seat for seat, episode in playing.items() if episode.observation is not None]
        complete = len(waiting) >= width or not pool.busy
        events = [] if waiting and complete else pool.wait()
        if waiting and not events:  # a batch, or whoever waits behind one that is slow
            asked = {seat: playing[seat] for seat in waiting[:width]}
            _act(actor, protocol, pool, asked, action_dim, images)
        for event in events:
            episode = playing.get(event.seat)
            if episode is None:
                continue  # an empty seat of a process that was replaced
            match event:
                case Advanced(moved=moved):
                    _advance(episode, moved)
                    if moved.success or moved.truncated or episode.steps >= protocol.horizon:
                        yield episode.end(moved.success)
                        del playing[event.seat]
                        begin(event.seat)
                case Broken(text=text):
                    yield episode.end(None, text)
                    del playing[event.seat]
                    begin(event.seat)
                case Interrupted():
                    queue.put_back(episode.job)
                    del playing[event.seat]
                    begin(event.seat)


def _advance(episode: _Episode, moved: Moved) -> None:
    episode.steps += moved.steps
    episode.frames += moved.frames
    episode.observation = dataclasses.replace(moved.observation, instruction=episode.job.instruction)


def _act(
    actor: Actor,
    protocol: Protocol,
    pool: Pool,
    asked: Mapping[Seat, _Episode],
    action_dim: int,
    images: bool,
) -> None:
    observations = [e.observation for e in asked.values() if e.observation is not None]
    keys = [EpisodeKey(e.job.seed, e.job.task, e.replans) for e in asked.values()]
    chunks = actor.act(observations, keys)
    if len(chunks) != len(keys):
        raise SimulationError(f"the actor was asked for {len(keys)} chunks and returned {len(chunks)}")
    for (seat, episode), chunk in zip(asked.items(), chunks, strict=True):
        left = protocol.horizon - episode.steps
        actions = _checked(chunk, episode.job, action_dim)[: min(protocol.replan, left)]
        episode.observation = None
        episode.replans += 1
        render = images and len(actions) < left
        pool.send(seat, Play(seat.slot, actions, render, episode.job.film))


def _checked(chunk: ActionChunk, job: Job, action_dim: int) -> NDArray[np.float32]:
    """Return the chunk's actions, or raise: a policy that returns nonsense has not failed, it is broken."""
    actions = np.asarray(chunk.actions, np.float32)
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != action_dim:
        raise SimulationError(
            f"task {job.task!r}, seed {job.seed}: the actor returned actions of shape {actions.shape}; "
            f"a chunk is [steps, {action_dim}], with at least one step"
        )
    if not np.isfinite(actions).all():
        raise SimulationError(
            f"task {job.task!r}, seed {job.seed}: the actor returned NaN or infinity; the policy has diverged"
        )
    return actions
