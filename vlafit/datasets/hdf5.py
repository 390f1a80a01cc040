"""Episodes in HDF5 files: one group a demonstration, one row a step. What the HDF5 layouts share.

Columns are read and checked once, when a store is opened. Frames are read on demand: through a memory map
if a dataset is contiguous in its file (20 to 50 times as fast as h5py) or a frame is a chunk without a
filter, else through a few cached handles.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlafit.datasets import hdf5_index
from vlafit.datasets.card import CameraCard, Card
from vlafit.datasets.columns import parse_key
from vlafit.datasets.hdf5_chunks import frame_offsets
from vlafit.datasets.hdf5_demos import (
    Demonstration,
    Episode,
    Frames,
    Hdf5Layout,
    decoded,
    read_episode,
    sentence,
    succeeds,
)
from vlafit.datasets.hdf5_files import (
    HDF5_ERRORS,
    SUFFIXES,
    damage_named,
    item_at,
    names_of,
    natural,
    open_file,
    reading,
    shared_folder,
    unreadable,
)
from vlafit.datasets.hdf5_guess import filter_keys_below, success_key_below
from vlafit.datasets.hdf5_storage import require_inside
from vlafit.datasets.lru import LruCache
from vlafit.datasets.mapped import Mapped
from vlafit.datasets.selection import Selection
from vlafit.datasets.stamps import Stamps, stamp
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

LISTED = 20  # files that a message names
OPEN_FILES = 64  # kept open by a process through h5py
OPEN_MAPS = 32  # memory maps, for each of which Python keeps a file open besides our own
OPEN_DATASETS = 256  # handles kept by a process
KNOWN_OFFSETS = 4096  # chunked datasets of whose frames a process knows the places, 8 bytes a frame


def _folder_of(card: Card) -> Path:
    """Return the folder of a card's files: what it names, or where the one file lies that it names."""
    named = card.location().resolve()
    return named.parent if named.is_file() else named


class Hdf5Store(EpisodeStore):
    """Episodes of HDF5 files."""

    selects = counts_rows = True

    def __init__(self, card: Card, layout: Hdf5Layout) -> None:
        """Raises DataError saying where the files are not what the card says."""
        self.card = card
        named = card.files(SUFFIXES)
        own = [path.resolve() for path in named]
        roots = (_folder_of(card), *card.linked_folders(layout.linked))
        for path in named:
            require_inside(path, roots, str(path))
        self._paths = {str(path): stamp(path) for path in own}
        self._reset()
        folder = shared_folder(own)
        self._episodes: list[Episode] = []
        key = hdf5_index.key_of(card, self._paths)
        index = hdf5_index.load(key)
        if index is None:
            index = self._index(own, folder, roots, layout)
            hdf5_index.save(key, index)
        self._paths, self._episodes = dict(index.paths), list(index.columns)
        self._stamps = Stamps(index.paths)
        self.episodes, self.left_out = tuple(index.episodes), tuple(index.left_out)

    def _index(
        self, own: Sequence[Path], folder: Path, roots: Sequence[Path], layout: Hdf5Layout
    ) -> hdf5_index.Index:
        """Read the files."""
        infos: list[EpisodeInfo] = []
        selection = Selection(self.card)
        for path, name in zip(own, names_of(own, folder), strict=True):
            with _others_named(own, path), selection.guard(name), reading(path) as file:
                for demo in layout.list(self.card, file, path, name):
                    if selection.wants(demo.id):
                        with selection.guard(demo.id), damage_named(f"{path}: {demo.id}"):
                            self._add(file, demo, path, roots, layout, selection, infos)
        left_out = selection.finish(f"dataset {self.card.name!r}", len(infos))
        sources = {name for episode in self._episodes for name in episode.sources}
        stamps = self._paths | {name: stamp(Path(name)) for name in sources - self._paths.keys()}
        return hdf5_index.Index(self._paths, stamps, infos, self._episodes, left_out)

    def _add(
        self,
        file: h5py.File,
        demo: Demonstration,
        path: Path,
        roots: Sequence[Path],
        layout: Hdf5Layout,
        selection: Selection,
        infos: list[EpisodeInfo],
    ) -> None:
        card = self.card
        extra = (card.rows.observations or layout.observations) == "T+1"
        if card.episodes.success and not succeeds(file, path, demo, card.episodes.success):
            return selection.fails(demo.id)
        text = sentence(card, file, path, demo, layout.tell)
        episode = read_episode(file, demo, card, path, roots, extra)
        for frames in episode.frames:  # not the opened file if it is a link
            for name in (frames.file, *frames.sources):
                self._paths.setdefault(name, stamp(Path(name)))
        infos.append(EpisodeInfo(demo.id, demo.task, text, len(episode.actions), demo.seed))
        self._episodes.append(episode)
        return None

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[self.require_episode(episode)].state

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._episodes[self.require_episode(episode)].actions

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        slot = self.camera_slot(camera)
        step = self.require_step(episode, step)
        return next(iter(self._frames(episode, step, [slot]).values()))

    def frames_at(self, episode: int, step: int) -> dict[str, NDArray[np.uint8]]:
        return self._frames(episode, self.require_step(episode, step), range(len(self.card.robot.cameras)))

    def _frames(self, episode: int, step: int, slots: Iterable[int]) -> dict[str, NDArray[np.uint8]]:
        """Return the frames of some cameras at a step."""
        cameras, images = self.card.robot.cameras, {}
        file, held = "", None
        for slot in slots:
            frames, camera = self._episodes[episode].frames[slot], cameras[slot]
            start = self._start(frames, camera, step, episode)
            if start < 0:
                images[camera.name] = camera.upright(self._read(frames, camera, step, episode))
                continue
            if held is None or frames.file != file:  # cameras of one file are asked about once
                file, held = frames.file, self._map(frames.file).bytes()
            shape = (camera.height, camera.width, 3)
            frame = held[start : start + shape[0] * shape[1] * 3].reshape(shape)
            images[camera.name] = camera.upright(frame)
        return images

    def files(self) -> tuple[Path, ...]:
        return tuple(map(Path, self._paths))

    def success_key(self) -> str:
        with reading(self.card.files(SUFFIXES)[0]) as file:
            return success_key_below(file)

    def filter_keys(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for path in self.card.files(SUFFIXES):
            with reading(path) as file:
                keys = filter_keys_below(file)
            if not keys and not counts:  # of thousands of files the first tells
                break
            for key, count in keys.items():
                counts[key] = counts.get(key, 0) + count
        return counts

    def close(self) -> None:
        self._handles.clear()
        self._datasets.clear()
        self._maps.clear()
        self._offsets.clear()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handles": None, "_datasets": None, "_maps": None, "_offsets": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._handles: LruCache[str, h5py.File] = LruCache(OPEN_FILES, drop=self._close)
        self._datasets: LruCache[tuple[str, str], h5py.Dataset] = LruCache(OPEN_DATASETS)
        self._maps: LruCache[str, Mapped] = LruCache(OPEN_MAPS, drop=lambda _, mapped: mapped.close())
        self._offsets: LruCache[tuple[str, str], NDArray[np.int64] | None] = LruCache(KNOWN_OFFSETS)

    def _close(self, name: str, handle: h5py.File) -> None:
        self._datasets.forget(lambda key: key[0] == name)
        handle.close()

    def _read(self, frames: Frames, camera: CameraCard, step: int, episode: int) -> NDArray[np.uint8]:
        self._require_unchanged(frames)
        where = f"{frames.file}: {self.episodes[episode].id}, step {step}"
        try:
            dataset = self._dataset(frames)
            frame = decoded(dataset, step, camera, where) if frames.encoded else np.asarray(dataset[step])
        except HDF5_ERRORS as error:
            raise DataError(f"{where}: the image of {camera.name!r} is damaged ({error})") from error
        if frame.shape != (camera.height, camera.width, 3):
            raise DataError(
                f"{where}: the image of {camera.name!r} is {frame.shape}, the card says "
                f"{camera.height}x{camera.width}"
            )
        frame.flags.writeable = False
        return frame

    def _start(self, frames: Frames, camera: CameraCard, step: int, episode: int) -> int:
        """Return where a frame is in its file; -1 if h5py must read it."""
        if frames.offset >= 0:
            return frames.offset + step * camera.height * camera.width * 3
        if frames.encoded:
            return -1
        key = (frames.file, frames.dataset)
        try:
            offsets = self._offsets.get(key, lambda: self._offsets_of(frames))
        except HDF5_ERRORS as error:
            where = f"{frames.file}: {self.episodes[episode].id}, step {step}"
            raise DataError(f"{where}: the image of {camera.name!r} is damaged ({error})") from error
        return -1 if offsets is None else int(offsets[step])

    def _offsets_of(self, frames: Frames) -> NDArray[np.int64] | None:
        self._require_unchanged(frames)
        return frame_offsets(self._dataset(frames), self._map(frames.file).bytes())

    def _require_unchanged(self, frames: Frames) -> None:
        for name in (frames.file, *frames.sources):
            self._stamps.require_unchanged(name)

    def _map(self, file: str) -> Mapped:
        return self._maps.get(file, lambda: Mapped(file, self._stamps.known(file)))

    def _dataset(self, frames: Frames) -> h5py.Dataset:
        return self._datasets.get((frames.file, frames.dataset), lambda: self._open_dataset(frames))

    def _open_dataset(self, frames: Frames) -> h5py.Dataset:
        handle = self._handles.get(frames.file, lambda: open_file(Path(frames.file)))
        dataset = item_at(handle, frames.dataset)
        assert isinstance(dataset, h5py.Dataset)  # checked when the store was opened
        return dataset


@contextmanager
def _others_named(paths: Sequence[Path], path: Path) -> Iterator[None]:
    """Add to the error about a file that cannot be opened the names of the later ones that cannot, either."""
    try:
        yield
    except DataError as error:
        if not unreadable([path]):
            raise
        others = unreadable(paths[paths.index(path) + 1 :])
        if not others:
            raise
        more = f"\nand {len(others) - LISTED} more" if len(others) > LISTED else ""
        listed = "".join(f"\n  {fault}" for fault in others[:LISTED])
        raise DataError(f"{error}\nNor can these be opened:{listed}{more}") from error


def whole_file(card: Card, file: h5py.File, path: Path, name: str) -> Iterator[Demonstration]:
    """List the one demonstration that a whole file is; its task is its folder, from the files' own on."""
    yield Demonstration("/", name, name.rpartition("/")[0] or path.parent.name)


def declared_length(group: Any) -> int | None:
    """Return the attribute num_samples of a demonstration; None if it has none."""
    count = group.attrs.get("num_samples")
    return int(count) if isinstance(count, int | np.integer) else None


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
    groups = with_keys(file, path, card, [f"data/{name}" for name in names])
    return [group.removeprefix("data/") for group in groups]


def with_keys(file: h5py.File, path: Path, card: Card, groups: list[str]) -> list[str]:
    """Return the groups that have any of the card's keys, all if none has; a warning names the others."""
    robot = card.robot
    columns = [*robot.state.keys, *robot.action.keys]
    keys = [parse_key(key, str(path)).path for key in columns] + [camera.key for camera in robot.cameras]
    chosen = [group for group in groups if any(f"{group}/{key}" in file for key in keys)]
    if not chosen:
        return groups  # the first missing key is named when they are read
    extra = [group for group in groups if group not in set(chosen)]
    if extra:
        log.warning("%s: left out, with none of the card's keys: %s", path, ", ".join(extra))
    return chosen
