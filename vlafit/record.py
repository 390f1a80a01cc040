"""Recording demonstrations with a scripted expert, as a data card asks: LIBERO's layout, one file a task.

The episodes of a task are its first so many seeds that the expert solves, so neither the number of workers nor
an interruption changes a byte. Finished episodes wait in a hidden folder beside the files until their task is
complete. This module and its workers import no torch.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit import envs, files
from vlafit.datasets.card import Card, RecordSpec
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError, DataError, SimulationError
from vlafit.types import Embodiment, Env, EpisodeKey, require_same

log = logging.getLogger(__name__)

STATE_KEYS = ("obs/ee_pos", "obs/gripper_states")  # where the hand's position and the rest of the state go
BURST_CHANCE = 0.06  # a step's chance that a push begins, when none lasts
BURST_STEPS = (4, 13)  # a push lasts this many steps: from, to below
ATTEMPTS = 3  # times the episodes wanted; more attempts than that and the expert is no expert


@dataclass(frozen=True)
class RecordProgress:
    """How far a recording is: episodes of all tasks, and the time it took and is likely to take."""

    task: str
    done: int
    wanted: int
    skipped: int
    elapsed_s: float
    remaining_s: float | None


@dataclass(frozen=True)
class RecordedFile:
    """One task's file. `skipped` are the seeds that the expert failed."""

    path: Path
    task: str
    episodes: int
    frames: int
    skipped: tuple[int, ...]


@dataclass(frozen=True)
class RecordReport:
    """What a recording made."""

    files: tuple[RecordedFile, ...]
    seconds: float

    @property
    def episodes(self) -> int:
        """Episodes in all files."""
        return sum(file.episodes for file in self.files)

    @property
    def frames(self) -> int:
        """Frames in all files."""
        return sum(file.frames for file in self.files)


@dataclass(frozen=True)
class _Job:
    """Everything that decides an episode's bytes, but for its task and seed."""

    spec: EnvSpec
    record: RecordSpec


def record(
    card: Card,
    out: Path,
    *,
    episodes_per_task: int | None = None,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[RecordProgress], None] = lambda _: None,
) -> RecordReport:
    """Record what `card` asks for into the folder `out`, one file a task.

    `episodes_per_task` replaces the card's number. With `resume`, finished files and episodes of an earlier
    call that asked for the same are kept; without it, `out` must hold no recording. With 0 or 1 `workers`
    episodes are played in this process. Raises ConfigError for a card that cannot be recorded,
    EmbodimentError when its robot is not the simulation's, DataError for what is in the way in `out`, and
    SimulationError when the simulation or the expert fails.
    """
    started = time.monotonic()
    job = _job(card, episodes_per_task)
    env = envs.make(job.spec)
    try:
        _require_recordable(card, job, env)
        where = _Folder(Path(out), job, env)
    finally:
        env.close()
    where.prepare(resume)
    tally = _Tally(job.record, progress, started)
    for task in job.record.tasks:
        tally.add(where.finished(task))
    open_tasks = [task for task in job.record.tasks if task not in tally.complete]
    if open_tasks:
        with _players(job, workers, where) as pool:
            _play_all(open_tasks, job, where, pool, max(1, workers), tally)
    where.clean()
    seconds = time.monotonic() - started
    done = tuple(tally.complete[task] for task in job.record.tasks)
    log.info("recorded %d episodes of %s in %.0f s", sum(f.episodes for f in done), card.name, seconds)
    return RecordReport(done, seconds)


def _job(card: Card, episodes_per_task: int | None) -> _Job:
    where = str(card.file or f"card {card.name!r}")
    if card.record is None:
        raise ConfigError(f"{where}: has no [record] section; this dataset is not one that is recorded here")
    if card.layout != "libero":
        raise ConfigError(f"{where}: recordings have layout \"libero\", not {card.layout!r}")
    if episodes_per_task is not None and episodes_per_task < 1:
        raise ConfigError(f"episodes_per_task = {episodes_per_task}; record at least one episode of each task")
    sizes = {(camera.height, camera.width) for camera in card.robot.cameras}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ConfigError(f"{where}: to record, all cameras must have one size, as high as wide; got {sorted(sizes)}")
    for camera in card.robot.cameras:
        if camera.rotate or camera.key != f"obs/{camera.name}_rgb":
            raise ConfigError(
                f"{where}: camera {camera.name!r} is recorded upright as 'obs/{camera.name}_rgb'; "
                f"write that key and rotate = 0, not {camera.key!r} and {camera.rotate}"
            )
    keys = {"state": card.robot.state.keys, "action": card.robot.action.keys}
    for name, expected in (("state", STATE_KEYS), ("action", ("actions",))):
        if keys[name] != expected:
            raise ConfigError(f"{where}: robot.{name}.keys of a recording are {list(expected)}, not {list(keys[name])}")
    asked = card.record if episodes_per_task is None else replace(card.record, episodes_per_task=episodes_per_task)
    renderer: Any = card.robot.renderer or "ray"
    spec = EnvSpec(
        asked.env,
        size=card.robot.cameras[0].height,
        renderer=renderer,
        cameras=tuple(camera.name for camera in card.robot.cameras),
        horizon=asked.horizon + asked.hold_steps,
    )
    return _Job(spec, asked)


def _require_recordable(card: Card, job: _Job, env: Env) -> None:
    card_is = str(card.file or f"card {card.name!r}")
    require_same(card.embodiment, card_is, env.embodiment, f"environment {job.spec.name!r}")
    if card.robot.renderer and card.robot.renderer != env.embodiment.renderer:
        raise ConfigError(
            f"{card_is}: robot.renderer is {card.robot.renderer!r}, the environment draws with {env.embodiment.renderer!r}"
        )
    for task in job.record.tasks:
        env.instruction(task)  # raises for a task that there is not
    envs.expert(job.spec.name)


# ---------------------------------------------------------------------------------------------- one episode


@dataclass(eq=False)
class Episode:
    """A recorded episode of t steps: state [t, s], actions [t, a], success so far [t], images [t, h, w, 3]."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: NDArray[np.bool_]
    images: dict[str, NDArray[np.uint8]]


def is_perturbed(spec: RecordSpec, seed: int) -> bool:
    """Return whether the episode of `seed` is disturbed: evenly spread, `spec.perturbed` of all."""
    at = seed - spec.first_seed
    return int((at + 1) * spec.perturbed + 1e-9) > int(at * spec.perturbed + 1e-9)


def pushes(spec: RecordSpec, task: str, seed: int, steps: int) -> NDArray[np.float32]:
    """Return what is added to the x, y, z of the executed actions, [steps, 3]; the labels stay clean.

    A push is one normal draw (std `spec.noise`) that lasts a few steps, so that the hand really leaves the
    expert's path and the expert is seen to come back. Episodes that are not perturbed have none.
    """
    added = np.zeros((steps, 3), np.float32)
    if not is_perturbed(spec, seed):
        return added
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), 0x9E3779B9])  # not the stream of any rollout
    step = 0
    while step < steps:
        if rng.random() < BURST_CHANCE:
            until = min(step + int(rng.integers(*BURST_STEPS)), steps)
            added[step:until] = rng.normal(0, spec.noise, 3)
            step = until
        step += 1
    return added


def play(env: Env, spec: RecordSpec, task: str, seed: int) -> Episode | None:
    """Let the expert play one episode; None when it does not succeed within `spec.horizon` steps."""
    expert = envs.expert(spec.env)
    most = spec.horizon + spec.hold_steps
    added = pushes(spec, task, seed, most)
    observation = env.reset(task, seed)
    states, actions, successes = [], [], []
    images: dict[str, list[NDArray[np.uint8]]] = {camera.name: [] for camera in env.embodiment.cameras}
    end = spec.horizon  # steps; success moves it
    succeeded = False
    for step in range(most):
        label = expert.act([observation], [EpisodeKey(seed, task, step)])[0].actions[0]
        states.append(observation.state)
        actions.append(label)
        for name, frames in images.items():
            frames.append(observation.images[name])
        executed = label.copy()
        executed[:3] = np.clip(executed[:3] + added[step], -1, 1)
        before = succeeded
        observation, succeeded, _ = env.step(executed, render=not (succeeded and step + 1 >= end))
        successes.append(succeeded)
        if succeeded and not before:
            end = step + 1 + spec.hold_steps
        if step + 1 >= end:
            break
    if not succeeded:
        return None
    return Episode(
        np.stack(states),
        np.stack(actions),
        np.array(successes),
        {name: np.stack(frames) for name, frames in images.items()},
    )


# -------------------------------------------------------------------------------------- files and parts of them


class _Folder:
    """Where a recording goes: one HDF5 file a task, and a hidden folder of finished episodes meanwhile."""

    def __init__(self, out: Path, job: _Job, env: Env) -> None:
        self.out, self.job = out, job
        self.embodiment: Embodiment = env.embodiment
        self.instructions = {task: env.instruction(task) for task in job.record.tasks}
        self.settings: dict[str, Any] = {
            "type": "vlafit",
            "env_name": job.spec.name,
            "renderer": env.embodiment.renderer,
            "size": job.spec.size,
            "cameras": list(job.spec.cameras),
            "hz": env.embodiment.hz,
            "control": env.embodiment.control,
            "horizon": job.record.horizon,
            "hold_steps": job.record.hold_steps,
            "first_seed": job.record.first_seed,
            "perturbed": job.record.perturbed,
            "noise": job.record.noise,
            "versions": dict(env.versions),
        }
        text = json.dumps(self.settings, sort_keys=True)
        self.print = hashlib.sha256(text.encode()).hexdigest()[:16]  # names the settings
        self.parts = out / f".episodes-{self.print}"

    def file(self, task: str) -> Path:
        return self.out / f"{task}_demo.hdf5"

    def part(self, task: str, seed: int) -> Path:
        return self.parts / task / f"{seed}.npz"

    def prepare(self, resume: bool) -> None:
        """Make the folder, or raise DataError when something of an earlier recording is in the way."""
        files.require_writable(self.out)
        there = [self.file(task) for task in self.job.record.tasks if self.file(task).exists()]
        others = [path for path in sorted(self.out.glob(".episodes-*")) if path != self.parts]
        if not resume:
            begun = there + [path for path in (self.parts, *others) if path.exists()]
            if begun:
                raise DataError(
                    f"{self.out} holds a recording already ({begun[0].name}); go on with --resume, "
                    "or choose another folder, or delete it"
                )
        for path in others:
            log.warning("%s holds episodes of a recording with other settings; delete it if it is not wanted", path)
        self.parts.mkdir(exist_ok=True)

    def clean(self) -> None:
        """Remove the hidden folder; every episode is in its file."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def finished(self, task: str) -> RecordedFile | None:
        """Return what the file of `task` holds, None when there is none. DataError when it is another recording's."""
        path = self.file(task)
        if not path.exists():
            return None
        try:
            with h5py.File(path, "r") as file:
                attrs = dict(file["data"].attrs)
                same = attrs.get("recording") == self.print and attrs["num_demos"] == self.job.record.episodes_per_task
                found = RecordedFile(
                    path, task, int(attrs["num_demos"]), int(attrs["total"]), tuple(json.loads(attrs["skipped_seeds"]))
                )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: is no recording of this card ({error}); move it away, or choose another folder") from error
        if not same:
            raise DataError(
                f"{path}: was recorded with other settings or another number of episodes; "
                "move it away, or choose another folder"
            )
        return found

    def save_part(self, task: str, seed: int, episode: Episode | None) -> bool:
        """Write an episode, or the mark that the expert failed; return whether it succeeded."""
        arrays: dict[str, Any] = {}
        if episode is not None:
            arrays = {"state": episode.state, "actions": episode.actions, "success": episode.success}
            arrays |= {f"image_{name}": frames for name, frames in episode.images.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_atomic(self.part(task, seed), buffer.getvalue())
        return episode is not None

    def load_part(self, task: str, seed: int) -> Episode | None:
        """Read what `save_part` wrote."""
        path = self.part(task, seed)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if "state" not in arrays:
                    return None
                images = {name: arrays[f"image_{name}"] for name in self.job.spec.cameras}
                return Episode(arrays["state"], arrays["actions"], arrays["success"], images)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it and resume") from error

    def played(self, task: str) -> dict[int, bool]:
        """Return the seeds of `task` played by an earlier call, and whether the expert succeeded."""
        outcomes = {}
        for path in sorted((self.parts / task).glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    outcomes[int(path.stem)] = "state" in arrays
            except (OSError, ValueError, zipfile.BadZipFile):
                log.warning("%s cannot be read; the episode is played again", path)
        return outcomes

    def write_file(self, task: str, outcomes: dict[int, bool]) -> RecordedFile:
        """Write the file of `task` from its parts, beside its place and then renamed into it."""
        path = self.file(task)
        partial = path.with_name(f".{path.name}.partial")
        try:
            frames = self._write(partial, task, outcomes)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}; free some space and resume") from error
        finally:
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.parts / task, ignore_errors=True)
        failed = tuple(seed for seed, good in sorted(outcomes.items()) if not good)
        return RecordedFile(path, task, len(outcomes) - len(failed), frames, failed)

    def _write(self, path: Path, task: str, outcomes: dict[int, bool]) -> int:
        good = [seed for seed, succeeded in sorted(outcomes.items()) if succeeded]
        total = 0
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            for index, seed in enumerate(good):
                episode = self.load_part(task, seed)
                if episode is None:
                    raise DataError(f"{self.part(task, seed)}: changed while recording; resume")
                total += self._write_demo(data.create_group(f"demo_{index}"), episode, seed)
            data.attrs["env_name"] = task
            data.attrs["problem_info"] = json.dumps({"language_instruction": self.instructions[task]})
            data.attrs["env_args"] = json.dumps(self.settings, sort_keys=True)
            data.attrs["macros_image_convention"] = "opencv"  # upright
            data.attrs["skipped_seeds"] = json.dumps([s for s, succeeded in sorted(outcomes.items()) if not succeeded])
            data.attrs["recording"] = self.print
            data.attrs["num_demos"] = len(good)
            data.attrs["total"] = total
        return total

    def _write_demo(self, demo: h5py.Group, episode: Episode, seed: int) -> int:
        steps = len(episode.actions)
        demo.attrs["num_samples"] = steps
        demo.attrs["seed"] = seed
        demo.attrs["perturbed"] = is_perturbed(self.job.record, seed)
        demo.attrs["expert"] = "scripted"
        dones = np.zeros(steps, np.uint8)
        dones[-1] = 1
        demo.create_dataset("actions", data=episode.actions.astype(np.float64))
        demo.create_dataset("rewards", data=episode.success.astype(np.uint8))
        demo.create_dataset("dones", data=dones)
        for name, frames in episode.images.items():
            demo.create_dataset(f"obs/{name}_rgb", data=frames)
        demo.create_dataset(STATE_KEYS[0], data=episode.state[:, :3].astype(np.float64))
        demo.create_dataset(STATE_KEYS[1], data=episode.state[:, 3:].astype(np.float64))
        return steps


# ------------------------------------------------------------------------------------------ who plays, and when


class _Tally:
    """Counts what is done and tells the caller."""

    def __init__(self, spec: RecordSpec, progress: Callable[[RecordProgress], None], started: float) -> None:
        self.complete: dict[str, RecordedFile] = {}
        self._spec, self._progress, self._started = spec, progress, started
        self._done = self._skipped = 0
        self._kept = 0  # of `_done`, from an earlier call: they say nothing about the pace

    def add(self, file: RecordedFile | None) -> None:
        """Note a file that was there already."""
        if file is not None:
            self.complete[file.task] = file
            self._done += file.episodes
            self._kept += file.episodes
            self._skipped += len(file.skipped)

    def played(self, task: str, succeeded: bool, *, earlier: bool = False) -> None:
        """Note an episode."""
        self._done += int(succeeded)
        self._skipped += int(not succeeded)
        self._kept += int(succeeded and earlier)
        wanted = len(self._spec.tasks) * self._spec.episodes_per_task
        elapsed = time.monotonic() - self._started
        fresh = self._done - self._kept
        remaining = elapsed / fresh * (wanted - self._done) if fresh else None
        self._progress(RecordProgress(task, self._done, wanted, self._skipped, elapsed, remaining))


class _Schedule:
    """Which seeds of which task to play next.

    The first seeds of a task, as many as episodes are wanted, and one more for every failure: so exactly the
    shortest run of seeds with enough successes is played, in whatever order the episodes end.
    """

    def __init__(self, tasks: Iterable[str], spec: RecordSpec) -> None:
        self._spec = spec
        self.outcomes: dict[str, dict[int, bool]] = {task: {} for task in tasks}
        self._following = {task: spec.first_seed + spec.episodes_per_task for task in self.outcomes}
        seeds = range(spec.first_seed, spec.first_seed + spec.episodes_per_task)
        self.waiting = deque((task, seed) for task in self.outcomes for seed in seeds)

    def ended(self, task: str, seed: int, succeeded: bool) -> bool:
        """Note how an episode ended; return whether its task has enough of them."""
        spec, outcomes = self._spec, self.outcomes[task]
        outcomes[seed] = succeeded
        good = sum(outcomes.values())
        if not succeeded:
            if len(outcomes) - good > (ATTEMPTS - 1) * spec.episodes_per_task + 10:
                raise SimulationError(
                    f"task {task!r}: the expert succeeded in only {good} of {len(outcomes)} episodes within "
                    f"{spec.horizon} steps; leave the task out, or raise the card's record.horizon"
                )
            self.waiting.appendleft((task, self._following[task]))
            self._following[task] += 1
        return good == spec.episodes_per_task


def _play_all(tasks: list[str], job: _Job, where: _Folder, pool: Executor, width: int, tally: _Tally) -> None:
    """Play what is missing, at most `width` episodes at a time, and write each task's file once it has enough."""
    schedule = _Schedule(tasks, job.record)
    kept = {task: where.played(task) for task in tasks}
    running: dict[Future[bool], tuple[str, int]] = {}

    def ended(task: str, seed: int, succeeded: bool, *, earlier: bool) -> None:
        enough = schedule.ended(task, seed, succeeded)
        if enough:
            tally.complete[task] = where.write_file(task, schedule.outcomes[task])
        tally.played(task, succeeded, earlier=earlier)

    while schedule.waiting or running:
        while schedule.waiting and len(running) < width:
            task, seed = schedule.waiting.popleft()
            if seed in kept[task]:
                ended(task, seed, kept[task][seed], earlier=True)
            else:
                running[pool.submit(_play_and_save, task, seed)] = (task, seed)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            ended(*running.pop(future), future.result(), earlier=False)


@contextmanager
def _players(job: _Job, workers: int, where: _Folder) -> Iterator[Executor]:
    """Yield what plays the episodes: this process, or so many others."""
    if workers <= 1:
        _begin(job, where)
        try:
            yield _Here()
        finally:
            _end()
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(job, where, os.getpid()))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise SimulationError(
            "a recording process died, perhaps for want of memory; finished episodes are kept: "
            "go on with --resume and fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        """Call `fn` now; an error is raised here."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class _Player:
    job: _Job
    where: _Folder
    env: Env


_player: _Player | None = None  # of this process; an environment is too costly to make for every episode


def _begin(job: _Job, where: _Folder) -> None:
    global _player
    _player = _Player(job, where, envs.make(job.spec))


def _end() -> None:
    global _player
    if _player is not None:
        _player.env.close()
    _player = None


def _begin_worker(job: _Job, where: _Folder, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which lets episodes end
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _begin(job, where)


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _play_and_save(task: str, seed: int) -> bool:
    assert _player is not None
    return _player.where.save_part(task, seed, play(_player.env, _player.job.record, task, seed))
