"""Measurements of the frames of every episode and camera, each frame decoded once.

Of a large dataset they are kept on disk while they are taken, so that they need little memory and a check
that was stopped goes on where it was.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from vlafit import files, locks
from vlafit.datasets.checks import curves
from vlafit.datasets.hdf5_index import folder
from vlafit.datasets.store import EpisodeStore
from vlafit.datasets.write import card_text
from vlafit.errors import DataError, StorageError

log = logging.getLogger(__name__)

SIZE = 32  # pixels of the small frames that are compared
BATCH = 64  # frames read at once
FEWEST_FRAMES = 50_000  # of all cameras, that are worth keeping: some minutes of decoding
AT_ONCE = 64  # episodes whose measurements are written to the disk together: it takes some 30 ms
PARTS = 16  # of an episode, whose mean frames are compared
FORMAT = 2  # raise it if a measurement changes


@dataclass(frozen=True)
class Clip:
    """The small frames of one camera of one episode."""

    episode: str
    camera: str
    mean: NDArray[np.float32]  # [SIZE, SIZE, 3], over the episode
    parts: NDArray[np.uint8]  # [PARTS, SIZE, SIZE, 3], the means over equal parts of it
    change: NDArray[np.float64]  # [T - 1], mean absolute difference of neighbouring frames
    level: NDArray[np.float64]  # [T], mean grey level
    features: NDArray[np.float32]  # [T, curves.FEATURES], see checks/curves.py
    sharpness: float  # mean absolute difference of neighbouring pixels of a row


@contextmanager
def measured(
    store: EpisodeStore,
    progress: Callable[[int, int], None] | None,
    fewest: int = FEWEST_FRAMES,
    unreadable: dict[int, DataError] | None = None,
) -> Iterator[dict[str, list[Clip]]]:
    """Yield the clips of all episodes, by camera. `progress` is called with frames done and their number.

    Episodes with a frame that cannot be read are left out and added to `unreadable`, with the first error;
    without it they raise theirs.

    Measurements of `fewest` or more frames are kept on disk until the context ends without an error.
    """
    cameras = [camera.name for camera in store.embodiment.cameras]
    total, done = len(cameras) * sum(info.length for info in store.episodes), 0

    def count(frames: int) -> None:
        nonlocal done
        done += frames
        if progress is not None:
            progress(done, total)

    kept = _place(store) if total >= fewest else None
    if kept is None:
        clips: dict[str, list[Clip]] = {camera: [] for camera in cameras}
        for number in range(len(store.episodes)):
            with _readable(number, unreadable):
                made = {camera: measure(store, number, camera, count) for camera in cameras}
                for camera, clip in made.items():
                    clips[camera].append(clip)
        yield clips
        return
    with locks.exclusive(kept, "vlafit data check"):
        arrays = {camera: _Arrays(kept / str(n), store, camera) for n, camera in enumerate(cameras)}
        try:
            for number, info in enumerate(store.episodes):
                with _readable(number, unreadable):
                    for camera in cameras:
                        if arrays[camera].has(number):
                            count(info.length)
                        else:
                            arrays[camera].put(number, measure(store, number, camera, count))
        finally:
            for camera in cameras:
                arrays[camera].flush()
        yield {
            camera: [arrays[camera].get(n) for n in range(len(store.episodes)) if n not in (unreadable or ())]
            for camera in cameras
        }
    shutil.rmtree(kept)


@contextmanager
def _readable(number: int, unreadable: dict[int, DataError] | None) -> Iterator[None]:
    """Note that an episode has a frame that cannot be read."""
    try:
        yield
    except DataError as error:
        if unreadable is None:
            raise
        unreadable[number] = error


def _place(store: EpisodeStore) -> Path | None:
    """Return the folder for a dataset's measurements; None if there can be none."""
    base = folder()
    if base is None:
        return None
    try:
        return files.require_writable(base.with_name("checks")) / _key(store)
    except StorageError as error:  # only costs memory, and time if the check is stopped
        log.warning("a check that is stopped will begin anew (%s)", error)
        return None


class _Arrays:
    """The measurements of one camera in files, an episode after the other."""

    def __init__(self, place: Path, store: EpisodeStore, camera: str) -> None:
        self._camera, self._ids = camera, [info.id for info in store.episodes]
        self._ends = np.cumsum([info.length for info in store.episodes])
        count, frames = len(self._ids), int(self._ends[-1])
        place.mkdir(exist_ok=True)
        self._mean = _array(place / "mean.npy", np.float32, (count, SIZE, SIZE, 3))
        self._parts = _array(place / "parts.npy", np.uint8, (count, PARTS, SIZE, SIZE, 3))
        self._change = _array(place / "change.npy", np.float64, (frames,))
        self._level = _array(place / "level.npy", np.float64, (frames,))
        self._features = _array(place / "features.npy", np.float32, (frames, curves.FEATURES))
        self._sharpness = _array(place / "sharpness.npy", np.float64, (count,))
        self._done = _array(place / "done.npy", np.uint8, (count,))
        self._new: list[int] = []  # measured, and perhaps not on the disk yet

    def has(self, number: int) -> bool:
        """Whether an episode was measured."""
        return bool(self._done[number])

    def put(self, number: int, clip: Clip) -> None:
        """Keep an episode's measurements."""
        some = self._rows(number)
        self._mean[number], self._sharpness[number] = clip.mean, clip.sharpness
        self._parts[number] = clip.parts
        self._change[some][: len(clip.change)] = clip.change
        self._level[some], self._features[some] = clip.level, clip.features
        self._new.append(number)
        if len(self._new) == AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what was measured to the disk; then it counts as done, also after a loss of power."""
        for array in (self._mean, self._parts, self._sharpness, self._change, self._level, self._features):
            array.flush()
        self._done[self._new] = 1
        self._done.flush()
        self._new.clear()

    def get(self, number: int) -> Clip:
        """Return an episode's measurements; those of its frames stay on disk until they are read."""
        some = self._rows(number)
        return Clip(
            self._ids[number],
            self._camera,
            self._mean[number],
            self._parts[number],
            np.asarray(self._change[some][:-1]),
            np.asarray(self._level[some]),
            self._features[some],
            float(self._sharpness[number]),
        )

    def _rows(self, number: int) -> slice:
        return slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))


def _array(path: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
    """Open an array on disk, or create it with zeros where there is none of this shape."""
    if path.is_file():
        try:
            array = open_memmap(path, mode="r+")
            if array.shape == shape and array.dtype == kind:
                return array
        except (OSError, ValueError) as error:
            log.warning("%s: is damaged (%s), so frames are measured again", path, error)
        (path.parent / "done.npy").unlink(missing_ok=True)
    array = open_memmap(path, mode="w+", dtype=kind, shape=shape)
    try:
        with open(path, "r+b") as file:  # a full disk is an error here, and else the end of the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise StorageError(
            f"{path}: the measurements of a check need {array.nbytes / 1e9:.1f} GB: {error.strerror}; free "
            "space, set VLAFIT_CACHE to a folder of another disk, or to off: they are then kept in memory"
        ) from error
    return array


def _key(store: EpisodeStore) -> str:
    """Return a hash of everything that decides the measurements: the card, the states and all files."""
    states = hashlib.sha256()
    for number in range(len(store.episodes)):
        states.update(np.ascontiguousarray(store.state(number)).data)
    stamps = sorted((str(path), *at) for path, at in store.stamps())
    episodes = [[info.id, info.length] for info in store.episodes]
    parts = [FORMAT, version("vlafit"), card_text(store.card), episodes, stamps, states.hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def measure(store: EpisodeStore, number: int, camera: str, count: Callable[[int], None]) -> Clip:
    """Measure one camera of an episode; `count` is called with the frames read."""
    length = store.episodes[number].length
    total, changes, levels, features, edges = np.zeros((SIZE, SIZE, 3)), [], [], [], 0.0
    project = curves.projection()
    sums = np.zeros((PARTS, SIZE, SIZE, 3))
    part_of = np.arange(length) * PARTS // length  # of each frame
    last: NDArray | None = None
    for first in range(0, length, BATCH):
        frames = store.images(number, list(range(first, min(first + BATCH, length))), camera)
        small = _sampled(frames, SIZE).astype(np.float64)
        features.append(_cells(_sampled(frames, 4 * curves.GRID)) @ project)
        total += small.sum(axis=0)
        np.add.at(sums, part_of[first : first + len(small)], small)
        rows = frames[:, :: max(1, frames.shape[1] // SIZE)].astype(np.int16)
        edges += float(np.abs(np.diff(rows, axis=2)).mean()) * len(frames)
        levels.append(small.mean(axis=(1, 2, 3)))
        joined = small if last is None else np.concatenate([last[None], small])
        changes.append(np.abs(np.diff(joined, axis=0)).mean(axis=(1, 2, 3)))
        last = small[-1]
        count(len(frames))
    mean = (total / length).astype(np.float32)
    return Clip(
        store.episodes[number].id,
        camera,
        mean,
        _means(sums, np.bincount(part_of, minlength=PARTS)),
        np.concatenate(changes),
        np.concatenate(levels),
        np.concatenate(features),
        edges / length,
    )


def part_starts(length: int) -> NDArray[np.int64]:
    """Return the first steps of the PARTS of an episode, and its length [PARTS + 1]."""
    return -(-np.arange(PARTS + 1) * length // PARTS)


def _means(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the mean frames of the parts; without a frame (a short episode) that of the one before."""
    filled = np.maximum.accumulate(np.where(counts > 0, np.arange(PARTS), 0))
    return np.rint(sums[filled] / np.maximum(counts, 1)[filled, None, None, None]).astype(np.uint8)


def _sampled(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return `size` x `size` evenly spaced pixels of each frame."""
    rows = np.linspace(0, frames.shape[1] - 1, size).round().astype(int)
    columns = np.linspace(0, frames.shape[2] - 1, size).round().astype(int)
    return frames[:, rows][:, :, columns]


def _cells(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return frames [n, 4 * GRID, 4 * GRID, 3] averaged over 4 x 4 pixels, [n, GRID * GRID * 3]."""
    cells = frames.reshape(len(frames), curves.GRID, 4, curves.GRID, 4, 3).mean(axis=(2, 4), dtype=np.float32)
    return cells.reshape(len(frames), -1) - 128
