"""Serve one environment process: a few environments, driven by messages over a socket.

The process is a plain child (not a fork, and not multiprocessing's spawn, which would import the caller's
script again): it loads the simulator and never torch. It executes commands in order and answers each with
exactly one message, so the parent knows which episode is affected even when the process dies.
"""

import faulthandler
import os
import select
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec, make
from vlafit.errors import VlafitError
from vlafit.types import Embodiment, Env, Observation


@dataclass(frozen=True)
class Start:
    """The first command: create an environment and describe it. Answered by Ready or Failed."""

    spec: EnvSpec


@dataclass(frozen=True)
class Reset:
    """Start an episode in `slot`: reset, then `settle_steps`. Answered by Moved or Failed."""

    slot: int
    task: str
    seed: int
    settle_steps: int
    settle_action: tuple[float, ...]
    render: bool
    film: bool


@dataclass(frozen=True)
class Play:
    """Execute `actions` [k, a] in `slot`, up to the first success. Answered by Moved or Failed.

    Only the last observation is rendered, if `render`; with `film` every one is, and all are sent as frames.
    """

    slot: int
    actions: NDArray[np.float32]
    render: bool
    film: bool


@dataclass(frozen=True)
class Ready:
    """The environment's description of itself."""

    embodiment: Embodiment
    versions: Mapping[str, str]
    instructions: Mapping[str, str]  # of each task


@dataclass(frozen=True)
class Moved:
    """State of an episode after its last command. `frames` are uint8 [h, w, 3], of the first camera."""

    slot: int
    observation: Observation
    steps: int
    success: bool
    truncated: bool
    frames: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Failed:
    """A command that raised. Its slot's environment is discarded; the process continues."""

    text: str


Command = Start | Reset | Play
Reply = Ready | Moved | Failed


class _Worker:
    def __init__(self) -> None:
        self.spec: EnvSpec | None = None
        self.envs: dict[int, Env] = {}
        self.tasks: dict[int, str] = {}  # slot -> the task its environment has loaded

    def answer(self, command: Command) -> Reply:
        match command:
            case Start(spec):
                self.spec = spec
                env = self._env(0)
                tasks = {task: env.instruction(task) for task in env.tasks}
                return Ready(env.embodiment, dict(env.versions), tasks)
            case Reset():
                return self._reset(command)
            case Play():
                return self._play(command)

    def drop(self, slot: int) -> None:
        """Discard a slot's environment, because its state is unknown after a command raised."""
        env = self.envs.pop(slot, None)
        if env is not None:
            try:
                env.close()
            except Exception:  # the command's own error, which is reported, comes first
                pass

    def _env(self, slot: int) -> Env:
        if slot not in self.envs:
            assert self.spec is not None, "Start comes first"
            self.envs[slot] = make(self.spec)
        return self.envs[slot]

    def _reset(self, command: Reset) -> Moved:
        if self.tasks.get(command.slot, command.task) != command.task:
            self.drop(command.slot)  # otherwise it would keep the simulations of all earlier tasks
        self.tasks[command.slot] = command.task
        env = self._env(command.slot)
        observation = env.reset(command.task, command.seed)
        shape = env.embodiment.action.shape
        still = np.asarray(command.settle_action or np.zeros(shape), np.float32)
        for left in range(command.settle_steps, 0, -1):
            observation, _, _ = env.step(still, render=left == 1 and (command.render or command.film))
        frames = self._frames(env, observation, command.film)
        return Moved(command.slot, _sendable(observation), 0, False, False, frames)

    def _play(self, command: Play) -> Moved:
        env = self._env(command.slot)
        frames: list[NDArray[np.uint8]] = []
        last = len(command.actions) - 1
        for i, action in enumerate(command.actions):
            render = command.film or (command.render and i == last)
            observation, success, truncated = env.step(action, render=render)
            frames += self._frames(env, observation, command.film)
            if success or truncated or i == last:
                return Moved(
                    command.slot, _sendable(observation), i + 1, bool(success), bool(truncated), tuple(frames)
                )
        raise ValueError("a chunk without actions")

    def _frames(self, env: Env, observation: Observation, film: bool) -> tuple[NDArray[np.uint8], ...]:
        name = env.embodiment.cameras[0].name
        return (observation.images[name],) if film and name in observation.images else ()


def _sendable(observation: Observation) -> Observation:
    """Return the observation with plain dicts: a read-only mapping cannot be pickled."""
    images, privileged = dict(observation.images), dict(observation.privileged)
    return replace(observation, images=images, privileged=privileged)


def _end_with_parent(connection: Connection) -> None:
    """Exit when the parent closes the socket, even in the middle of a step that never returns."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # hang-ups are reported without a mask
    poll.poll()
    os._exit(1)


def main(handle: int) -> None:
    """Serve the socket `handle` until the parent closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this one
    faulthandler.enable()
    connection = Connection(handle)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    worker = _Worker()
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            break
        try:
            reply = worker.answer(command)
        except Exception as error:
            fixable = isinstance(command, Start) and isinstance(error, VlafitError)
            reply = Failed(str(error) if fixable else traceback.format_exc())
            if not isinstance(command, Start):
                worker.drop(command.slot)
        try:
            connection.send(reply)
        except OSError:
            break
    os._exit(0)  # skips interpreter shutdown, during which GL contexts print errors
