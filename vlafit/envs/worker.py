"""Serve one environment process: a few environments, driven by messages over a socket.

The process is a plain child (not a fork, and not multiprocessing's spawn, which would import the caller's
script again): it loads the simulator and never torch. It executes commands in order and answers each with
exactly one message, so the parent knows which episode is affected even when the process dies.
"""

import faulthandler
import math
import os
import platform
import select
import signal
import threading
import time
import traceback
from collections import deque
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.envs import EnvSpec, make, shares_process
from vlafit.envs.checks import check_flag, check_observation, missing_start
from vlafit.envs.garbage import keep_contexts
from vlafit.envs.messages import (
    COMMANDS,
    Command,
    Failed,
    Moved,
    Play,
    Ready,
    Reply,
    Reset,
    Start,
    Unplayable,
)
from vlafit.envs.wire import decode, encode
from vlafit.errors import SimulationError, VlafitError
from vlafit.types import Env, Observation

RECORDED = ("numpy", "mujoco", "gymnasium")  # packages whose versions an interpreter of its own adds
DRAWS = 10  # of a start's random actions, until one does not solve the task
START_STREAM = 0x2545F491  # separates the random actions at a start from numbers of the same seed elsewhere


class _Worker:
    def __init__(self) -> None:
        self.spec: EnvSpec | None = None
        self.timeout_s = math.inf
        self.envs: dict[int, Env] = {}
        self.episodes: dict[int, tuple[str, int]] = {}  # slot -> task and seed of its episode

    def answer(self, command: Command) -> Reply:
        match command:
            case Start(spec, start, timeout_s, seeds):
                self.spec, self.timeout_s = replace(spec, python=""), timeout_s
                env = self._env(0)
                tasks = {task: env.instruction(task) for task in env.tasks}
                known = {t: range(first, first + count) for t, (first, count) in seeds.items() if t in tasks}
                missing = tuple(filter(None, (missing_start(env, *each) for each in known.items())))
                before = _memory()
                if start is not None and start[0] in tasks and not missing:
                    try:
                        self._begin(0, *start, images=True)
                    except Exception as error:
                        fixable = isinstance(error, VlafitError)
                        return Unplayable(str(error) if fixable else traceback.format_exc())
                added = max(0, _memory() - before)
                versions = {**(_interpreter() if spec.python else {}), **env.versions}
                shared = shares_process(spec.name)
                return Ready(env.embodiment, versions, tasks, before, added, shared, missing)
            case Reset() | Play():
                began = time.monotonic()
                moved = self._reset(command) if isinstance(command, Reset) else self._play(command)
                took = time.monotonic() - began
                if took > self.timeout_s:  # the caller, which may be busy, kills only what does not answer
                    raise TimeoutError(
                        f"the environment answered after {took:.2g} s; it must within {self.timeout_s:g} s"
                    )
                return moved

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

    def _begin(self, slot: int, task: str, seed: int, *, images: bool) -> Observation:
        if slot in self.episodes and self.episodes[slot][0] != task:
            self.drop(slot)  # otherwise it would keep the simulations of all earlier tasks
        self.episodes[slot] = task, seed
        env = self._env(slot)
        observation = env.reset(task, seed)
        return check_observation(observation, env.embodiment, self._where(slot, 0), images=images)

    def _reset(self, command: Reset) -> Moved:
        """Begin an episode; random actions that already solve the task are drawn again, from its start."""
        for draw in range(DRAWS if command.start_steps else 1):
            observation = self._approach(command, draw)
            if observation is not None:
                frames = self._frames(self._env(command.slot), observation, command.film)
                return Moved(command.slot, observation, (), 0, False, False, frames)
        raise SimulationError(
            f"{self._where(command.slot, 0)}: start_steps = {command.start_steps} random actions solve the "
            f"task before the policy's first observation, in each of {DRAWS} draws; take fewer, or another "
            "first_seed"
        )

    def _approach(self, command: Reset, draw: int) -> Observation | None:
        """Return what the policy sees first; None if the random actions of this draw solve the task."""
        images = command.render or command.film
        observation = self._begin(command.slot, command.task, command.seed, images=images)
        env = self._env(command.slot)
        shape = env.embodiment.action.shape
        still = np.asarray(command.settle_action or np.zeros(shape), np.float32)
        random = np.random.default_rng([command.seed, START_STREAM, *([draw] if draw else [])])
        begin = [still] * command.settle_steps
        begin += list(random.uniform(-1, 1, (command.start_steps, *shape)).astype(np.float32))
        for number, action in enumerate(begin, start=1):
            render = number == len(begin) and images
            observation, solved, _ = self._step(env, command.slot, action, 0, render=render)
            if solved and number > command.settle_steps:
                return None
            if solved:
                raise SimulationError(
                    f"{self._where(command.slot, 0)}: the environment reports success after {number} of "
                    f"settle_steps = {command.settle_steps}, before the policy's first observation, so that "
                    "this start shows nothing of a policy; take another first_seed, or leave this task out"
                )
        return observation

    def _play(self, command: Play) -> Moved:
        env = self._env(command.slot)
        frames: list[NDArray[np.uint8]] = []
        newest: deque[Observation] = deque(maxlen=command.history)
        last = len(command.actions) - 1
        for i, action in enumerate(command.actions):
            render = command.film or (command.render and i > last - command.history)
            observation, success, truncated = self._step(env, command.slot, action, i + 1, render=render)
            newest.append(observation)
            frames += self._frames(env, observation, command.film)
            if success or truncated or i == last:
                *earlier, observation = newest
                return Moved(
                    command.slot, observation, tuple(earlier), i + 1, success, truncated, tuple(frames)
                )
        raise ValueError("a chunk without actions")

    def _step(
        self, env: Env, slot: int, action: NDArray[np.float32], number: int, *, render: bool
    ) -> tuple[Observation, bool, bool]:
        """Apply one action, and check what the environment answers; `number` counts within the command."""
        observation, success, truncated = env.step(action, render=render)
        where = self._where(slot, number)
        return (
            check_observation(observation, env.embodiment, where, images=render),
            check_flag(success, "success", where),
            check_flag(truncated, "truncated", where),
        )

    def _where(self, slot: int, number: int) -> str:
        task, seed = self.episodes[slot]
        return f"task {task!r}, seed {seed}, " + (f"step {number} of the chunk" if number else "at its start")

    def _frames(self, env: Env, observation: Observation, film: bool) -> tuple[NDArray[np.uint8], ...]:
        name = env.embodiment.cameras[0].name
        return (observation.images[name],) if film and name in observation.images else ()


def _memory() -> int:
    """Return this process's resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _interpreter() -> dict[str, str]:
    """Return the versions of this interpreter and of the packages that decide what a simulation does."""
    versions = {"python": platform.python_version()}
    for package in RECORDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return versions


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
    keep_contexts()
    connection = Connection(handle)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    worker = _Worker()
    while True:
        try:
            command = decode(connection.recv_bytes(), COMMANDS)
        except (EOFError, OSError):
            break
        try:
            reply = encode(worker.answer(command))
        except Exception as error:
            fixable = isinstance(command, Start) and isinstance(error, VlafitError)
            reply = encode(Failed(str(error) if fixable else traceback.format_exc()))
            if not isinstance(command, Start):
                worker.drop(command.slot)
        try:
            connection.send_bytes(reply)
        except OSError:
            break
    os._exit(0)  # skips interpreter shutdown, during which GL contexts print errors
