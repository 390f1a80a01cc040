"""Episodes in HDF5 files: one group a demonstration, one row a step. What the HDF5 layouts share.

Columns are read and checked once, when a store is opened. Frames are read on demand: through a memory map
if a dataset is contiguous in its file (20 to 50 times as fast as h5py), else through a few cached handles.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import Card, ColumnCard
from vlafit.datasets.hdf5_files import (
    SUFFIXES,
    find,
    names_of,
    natural,
    open_file,
    require_readable,
    shared_folder,
)
from vlafit.datasets.stamps import Stamps
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

OPEN_FILES = 64  # kept open by a process, with as many memory maps
OPEN_DATASETS = 256  # handles kept by a process


@dataclass(frozen=True)
class Demonstration:
    """One demonstration of a file, as a layout lists it; its columns are not read yet."""

    group: str
    """The group that holds it."""
    id: str
    task: str
    instruction: str
    seed: int | None = None


List = Callable[[Card, h5py.File, Path, str], Iterable[Demonstration]]
"""Lists the demonstrations of an open file, from the card, the file, its path and its name in the dataset."""


@dataclass(frozen=True)
class _Frames:
    """Where a camera's frames of one episode are."""

    file: int  # of the store's files
    dataset: str
    offset: int  # in the file, -1 if they are not contiguous


@dataclass(frozen=True)
class _Episode:
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    frames: tuple[_Frames, ...]  # of each camera


class Hdf5Store(EpisodeStore):
    """Episodes of HDF5 files."""

    def __init__(self, card: Card, list_demonstrations: List, linked: Sequence[str] = ()) -> None:
        """`linked` names folders outside the dataset's own that its files may link to."""
        self.card = card
        own = [path.resolve() for path in card.files(SUFFIXES)]
        self._paths = list(own)
        self._stamps = Stamps()
        for path in own:
            self._stamps.require_unchanged(path)
        self._handles: OrderedDict[int, h5py.File] = OrderedDict()
        self._datasets: OrderedDict[tuple[int, str], h5py.Dataset] = OrderedDict()
        self._maps: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._roots = (shared_folder(own), *(Path(folder).expanduser().resolve() for folder in linked))
        infos: list[EpisodeInfo] = []
        self._episodes: list[_Episode] = []
        for path, name in zip(own, names_of(own, self._roots[0]), strict=True):
            with open_file(path) as file:
                try:
                    for demo in list_demonstrations(card, file, path, name):
                        episode = self._read(file, demo, path)
                        length = len(episode.actions)
                        infos.append(EpisodeInfo(demo.id, demo.task, demo.instruction, length, demo.seed))
                        self._episodes.append(episode)
                except (OSError, RuntimeError) as error:  # what HDF5 raises for damage inside a file
                    raise DataError(f"{path}: is damaged ({error}); fetch or record it again") from error
        self.episodes = tuple(infos)

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[episode].state

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[episode].actions

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        slot = self.camera_slot(camera)
        self.require_step(episode, step)
        frames, declared = self._episodes[episode].frames[slot], self.card.robot.cameras[slot]
        shape = (declared.height, declared.width, 3)
        self._stamps.require_unchanged(self._paths[frames.file])
        if frames.offset >= 0:
            size = declared.height * declared.width * 3
            start = frames.offset + step * size
            frame = self._map(frames.file)[start : start + size].reshape(shape)
        else:
            try:
                frame = self._dataset(frames)[step]
            except (OSError, RuntimeError) as error:
                where = f"{self._paths[frames.file]}: {self.episodes[episode].id}, step {step}"
                raise DataError(f"{where}: the image of {camera!r} is damaged ({error})") from error
        return declared.upright(frame)

    def files(self) -> tuple[Path, ...]:
        return tuple(self._paths)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        self._datasets.clear()
        self._maps.clear()

    def __getstate__(self) -> dict[str, object]:
        empty = {name: OrderedDict() for name in ("_handles", "_datasets", "_maps")}
        return self.__dict__ | empty

    def _read(self, file: h5py.File, demo: Demonstration, path: Path) -> _Episode:
        where = f"{path}: {demo.group.rsplit('/', 1)[-1]}"
        group = file[demo.group]
        assert isinstance(group, h5py.Group)
        lengths: dict[str, int] = {}
        robot = self.card.robot
        state = self._column(group, robot.state, "state", where, lengths)
        actions = self._column(group, robot.action, "action", where, lengths)
        frames = []
        for camera in robot.cameras:
            dataset = self._find(group, camera.key, where)
            check_frames(dataset, (camera.height, camera.width, 3), camera.key, camera.name, where)
            lengths[camera.key] = dataset.shape[0]
            frames.append(_Frames(self._number(dataset), str(dataset.name), contiguous_offset(dataset)))
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise DataError(f"{where}: columns differ in length ({listed}); every row must be one step")
        if len(actions) == 0:
            raise DataError(f"{where}: the episode is empty; leave it out of the file")
        return _Episode(state, actions, tuple(frames))

    def _find(self, group: h5py.Group, key: str, where: str) -> h5py.Dataset:
        dataset = find(group, key, where)
        require_readable(dataset, self._roots, f"{where}: {key}")
        return dataset

    def _column(
        self, group: h5py.Group, column: ColumnCard, name: str, where: str, lengths: dict[str, int]
    ) -> NDArray[np.float32]:
        parts = []
        for key in column.keys:
            parts.append(read_column(self._find(group, key, where), name, key, where))
            lengths[key] = len(parts[-1])
        return join_columns(parts, column, name, where)

    def _number(self, dataset: h5py.Dataset) -> int:
        """Return the number of the file that really holds the dataset: not the opened one if it is a link."""
        path = Path(dataset.file.filename).resolve()
        if path not in self._paths:
            self._paths.append(path)
            self._stamps.require_unchanged(path)
        return self._paths.index(path)

    def _map(self, number: int) -> NDArray[np.uint8]:
        mapped = self._maps.get(number)
        if mapped is None:
            mapped = np.asarray(np.memmap(self._paths[number], mode="r", dtype=np.uint8))
            _keep(self._maps, number, mapped, OPEN_FILES)
        return mapped

    def _dataset(self, frames: _Frames) -> h5py.Dataset:
        key = (frames.file, frames.dataset)
        dataset = self._datasets.get(key)
        if dataset is not None:
            self._datasets.move_to_end(key)
            return dataset
        handle = self._handles.get(frames.file)
        if handle is None:
            handle = open_file(self._paths[frames.file])
            for number, old in _keep(self._handles, frames.file, handle, OPEN_FILES):
                for other in [k for k in self._datasets if k[0] == number]:
                    del self._datasets[other]
                old.close()
        dataset = handle[frames.dataset]
        assert isinstance(dataset, h5py.Dataset)  # checked when the store was opened
        _keep(self._datasets, key, dataset, OPEN_DATASETS)
        return dataset


def _keep(cache: OrderedDict, key: object, value: object, most: int) -> list:
    """Put a value into a cache, and return the oldest entries that had to go."""
    cache[key] = value
    return [cache.popitem(last=False) for _ in range(max(0, len(cache) - most))]


def demonstrations_below(file: h5py.File, path: Path, card: Card) -> list[str]:
    """Return the names of the groups of /data in natural order. Raises DataError if there is none.

    A group with none of the card's keys is no demonstration (normalisation statistics, say) and is left out
    with a warning.
    """
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        raise DataError(
            f"{path}: no group 'data', which layout {card.layout!r} has{did_you_mean('data', file.keys())}"
        )
    names = sorted((str(n) for n in data if data.get(n, getclass=True) is h5py.Group), key=natural)
    if not names:
        raise DataError(f"{path}: holds no demonstrations; leave the file out, or record it again")
    robot = card.robot
    keys = [*robot.state.keys, *robot.action.keys, *(camera.key for camera in robot.cameras)]
    chosen = [name for name in names if any(f"{name}/{key}" in data for key in keys)]
    if not chosen:
        return names  # the first missing key is named when they are read
    extra = [name for name in names if name not in set(chosen)]
    if extra:
        log.warning("%s: left out, with none of the card's keys: data/%s", path, ", data/".join(extra))
    return chosen


def read_column(dataset: h5py.Dataset, name: str, key: str, where: str) -> NDArray[np.float32]:
    """Return the floats [T, d] of one dataset. Raises DataError if a value is not finite in float32."""
    if dataset.ndim != 2 or dataset.dtype.kind != "f":
        raise DataError(f"{where}: {key} is {dataset.dtype} {dataset.shape}, a {name} column is float [T, d]")
    try:
        raw = dataset[()]
    except OSError as error:
        raise DataError(
            f"{where}: {key} cannot be read ({error}); the file is damaged, fetch it again"
        ) from None
    return finite(raw, key, where)


def finite(raw: NDArray, key: str, where: str) -> NDArray[np.float32]:
    """Return `raw` [T, d] as float32. Raises DataError naming the first value that is not finite."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        values: NDArray[np.float32] = raw.astype(np.float32)
    bad = ~np.isfinite(values)
    if bad.any():
        step, dimension = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{where}: {key} holds {values[step, dimension]} at step {step}, dimension {dimension}; "
            "fix the file or leave the demonstration out"
        )
    return values


def join_columns(
    parts: Sequence[NDArray[np.float32]], column: ColumnCard, name: str, where: str
) -> NDArray[np.float32]:
    """Return the parts of a column side by side, [T, dimensions], read-only.

    If their lengths differ the first part is returned, for the caller compares and refuses those of all.
    """
    width = sum(part.shape[1] for part in parts)
    if width != column.dimensions:
        widths = ", ".join(f"{key} {part.shape[1]}" for key, part in zip(column.keys, parts, strict=True))
        raise DataError(
            f"{where}: {name} has {width} dimensions ({widths}), the card says {column.dimensions}"
        )
    if len({len(part) for part in parts}) != 1:
        return parts[0]
    joined = np.concatenate(parts, axis=1)
    joined.flags.writeable = False
    return joined


def check_frames(dataset: h5py.Dataset, shape: tuple[int, ...], key: str, camera: str, where: str) -> None:
    """Raise DataError unless a dataset holds uint8 frames [T, h, w, 3] of the card's size."""
    if dataset.dtype != np.uint8 or dataset.ndim != 4:
        raise DataError(f"{where}: {key} is {dataset.dtype} {dataset.shape}, a camera is uint8 [T, h, w, 3]")
    if dataset.shape[1:] != shape:
        raise DataError(
            f"{where}: {key} has frames {dataset.shape[1:]}, the card says {shape} for camera {camera!r}"
        )


def contiguous_offset(dataset: h5py.Dataset) -> int:
    """Return the offset of a dataset's bytes in its file, or -1 if they must be read by h5py."""
    plain = dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external
    offset = dataset.id.get_offset() if plain else None
    return -1 if offset is None else int(offset)
