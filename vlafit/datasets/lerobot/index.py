"""Where the rows of LeRobot episodes are, and whether they agree with the metadata.

Of many files that is kept on disk, so that they are not read at each start: under a hash of the size and time
of every file. It can be deleted at any moment.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlafit.datasets.hdf5_index import folder
from vlafit.datasets.lerobot.clock import require_clock
from vlafit.datasets.lerobot.meta import Entry, Meta
from vlafit.datasets.lerobot.tables import as_rows
from vlafit.datasets.stamps import Stamp
from vlafit.errors import DataError, VlafitError
from vlafit.files import is_reachable_file, new_file

log = logging.getLogger(__name__)

FORMAT = 2  # raise it if anything that is kept, or its meaning, changes
FEWEST = 200  # data files that are worth it
COLUMNS = ("episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Place:
    """Where the rows of an episode are in its file, and what they say of it."""

    first: int
    task: int
    """Its task_index."""
    times_s: NDArray[np.float64] | None
    """The recorded timestamps, if they are not frame_index / fps."""


class FileIndex:
    """The bookkeeping columns of one data file."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        """`table` has the `COLUMNS` of the file at `path`."""
        self.path = path
        self.columns = {name: as_rows(table[name], 1, f"{path}: {name}")[:, 0] for name in COLUMNS}
        self.episodes = self.columns["episode_index"]
        if len(self.episodes) and (np.diff(self.episodes) < 0).any():
            raise DataError(f"{path}: the rows of its episodes are not in order")

    def episode(self, entry: Entry, meta: Meta, tolerance_s: float) -> Place:
        """Return where the rows of an episode are. Raises DataError where rows and metadata disagree."""
        where = f"{self.path}: episode {entry.index}"
        first = int(np.searchsorted(self.episodes, entry.index, "left"))
        count = int(np.searchsorted(self.episodes, entry.index, "right")) - first
        if count != entry.length:
            raise DataError(f"{where} has {count} rows, the metadata says {entry.length}; which is right?")
        if count == 0:
            raise DataError(f"{where} is empty; leave it out (skip in the card)")
        some = slice(first, first + count)
        if (self.columns["frame_index"][some] != np.arange(count)).any():
            raise DataError(
                f"{where}: frame_index does not count 0 to {count - 1}; rows are missing or twice there"
            )
        numbers = np.unique(self.columns["task_index"][some]).tolist()
        if len(numbers) > 1:
            raise DataError(
                f"{where} has {len(numbers)} tasks, {numbers}; one sentence an episode is read: split it, or "
                "leave it out (skip in the card)"
            )
        meta.task(numbers[0], entry)
        times = self.columns["timestamp"][some].astype(np.float64)
        if not np.isfinite(times).all():
            raise DataError(f"{where}: a timestamp is not finite")
        require_clock(times, meta.fps, tolerance_s, where)
        regular = np.abs(times - np.arange(count) / meta.fps).max() < 0.1 / meta.fps
        return Place(first, numbers[0], None if regular else times)


def key_of(
    entries: Sequence[Entry], fps: float, allowed: Sequence[object], stamps: Mapping[Path, Stamp]
) -> str:
    """Return the hash of everything that decides the places of `entries`, with what is `allowed` of them."""
    listed = [[entry.index, entry.length, str(entry.data), entry.rows, _windows(entry)] for entry in entries]
    files = sorted((str(path), *stamp) for path, stamp in stamps.items())
    parts = [FORMAT, version("vlafit"), fps, allowed, listed, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _windows(entry: Entry) -> list[list[object]]:
    return [[key, str(v.path), v.start_s, v.end_s] for key, v in sorted(entry.videos.items())]


def load(key: str, entries: Sequence[Entry]) -> dict[int, Place] | None:
    """Return the places kept under `key`, by the number of the episode; None if there are none."""
    base = folder()
    path = base / f"{key}.npz" if base else None
    if path is None or not is_reachable_file(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            first, task, irregular, times = (arrays[n] for n in ("first", "task", "irregular", "times"))
        lengths = np.array([entry.length for entry in entries])
        if (
            not len(first) == len(task) == len(irregular) == len(entries)
            or len(times) != lengths[irregular].sum()
        ):
            raise ValueError("arrays of other lengths")
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        log.warning("%s: the index is damaged (%s), so the files are read again", path, error)
        return None
    ends = np.cumsum(lengths * irregular)
    return {
        entry.index: Place(int(f), int(t), times[end - entry.length : end] if i else None)
        for entry, f, t, i, end in zip(entries, first, task, irregular, ends, strict=True)
    }


def save(key: str, entries: Sequence[Entry], places: Mapping[int, Place]) -> None:
    """Keep the places of `entries`. A folder that cannot be written to only costs time."""
    base = folder()
    if base is None:
        return
    ordered = [places[entry.index] for entry in entries]
    times = [place.times_s for place in ordered if place.times_s is not None]
    try:
        with new_file(base / f"{key}.npz") as partial, partial.open("wb") as file:
            np.savez(
                file,
                first=np.array([place.first for place in ordered], np.int64),
                task=np.array([place.task for place in ordered], np.int64),
                irregular=np.array([place.times_s is not None for place in ordered], bool),
                times=np.concatenate(times) if times else np.zeros(0),
            )
    except (OSError, VlafitError) as error:
        log.warning("the index of %d episodes cannot be kept (%s)", len(entries), error)
