"""Episodes of a LeRobot dataset: columns by file, images by row, video frames by time."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import CameraCard, Card, ColumnCard
from vlafit.datasets.columns import Key, parse_key, require_scale, scaled
from vlafit.datasets.lerobot import index
from vlafit.datasets.lerobot.clock import TOLERANCE_S, frame_times
from vlafit.datasets.lerobot.features import success_feature, width_of
from vlafit.datasets.lerobot.files import DatasetFiles, LocalFiles, raise_first, require_files, unnamed
from vlafit.datasets.lerobot.meta import Entry, Meta, file_below, read_meta, splits_of
from vlafit.datasets.lerobot.places import Places
from vlafit.datasets.lerobot.requirements import require_features
from vlafit.datasets.lerobot.stated import BY_EPISODE, WHOLE, read_statistics
from vlafit.datasets.lerobot.tables import ImageColumns, as_rows
from vlafit.datasets.lru import LruCache
from vlafit.datasets.pictures import decode_image
from vlafit.datasets.selection import Selection, is_skipped, is_success
from vlafit.datasets.stamps import Stamp
from vlafit.datasets.store import EpisodeInfo, EpisodeStore, RecordedStatistics
from vlafit.datasets.video import VideoFiles
from vlafit.errors import DataError, ranges
from vlafit.files import plain_bytes

COLUMN_BYTES = 2**30  # of states and actions that a process keeps
IMAGE_BYTES = 2**28  # of encoded images that a process keeps
OPEN_VIDEOS = 32
ATTEMPTS = 3  # to read a file of a cache that other processes delete files of
T = TypeVar("T")


@dataclass(frozen=True)
class _Rows:
    """Where the rows of an episode are, and when its frames were taken."""

    entry: Entry
    first: int
    times_s: NDArray[np.float64] | None
    """The recorded timestamps, if they are not frame_index / fps."""


@dataclass(frozen=True)
class _Column:
    """A state or action column of all episodes of a file."""

    values: NDArray[np.float32]
    bad: NDArray[np.bool_] | None
    """Which rows hold a value that is not finite, if any does."""


class LeRobotStore(EpisodeStore):
    """The episodes of a LeRobot dataset of any of the three formats."""

    selects = True

    def __init__(
        self,
        card: Card,
        root: Path,
        choose: Callable[[Meta], Sequence[int]],
        tolerance_s: float = TOLERANCE_S,
        files: DatasetFiles | None = None,
        skip: Collection[int] = (),
        *,
        surplus: bool = False,
    ) -> None:
        """`choose` returns the episode numbers to use, of those that the metadata lists; none of `skip`.

        `files` are those below `root`, if they are not all there. See `Places` for `tolerance_s`, `surplus`.
        """
        self.card = card
        self._meta = meta = read_meta(root)
        self._files = files or LocalFiles()
        self._few = any(feature.get("dtype") == "image" for feature in meta.features.values())
        require_features(card.robot, meta)
        wanted = set(choose(meta))
        if len(wanted) == len(meta.episodes):  # else the card has chosen
            self.splits = splits_of(meta)
        selection = Selection(card)
        names = {entry.index: f"episode_{entry.index:06d}" for entry in meta.episodes}
        entries = [e for e in meta.episodes if e.index in wanted and selection.wants(names[e.index])]
        keys = [camera.key for camera in card.robot.cameras]
        key = self._index_key(entries, [tolerance_s, surplus])
        kept = index.load(key, entries) if key else None
        unused = [number for number, name in names.items() if number in skip or is_skipped(card, name)]
        self._places = stated = Places(meta, keys, tolerance_s, unused, surplus=surplus)
        if card.episodes.on_bad == "stop" and kept is None:
            require_files(self._files, entries, keys)
        if kept is None and not self._files.in_place:
            stated.look_into_videos(entries)
        if card.episodes.on_bad == "stop":
            raise_first(stated.faults(entries))
        self._rows: list[_Rows] = []
        infos: list[EpisodeInfo] = []
        indices: dict[Path, index.FileIndex] = {}
        places: dict[int, index.Place] = {}
        self._reset()
        for entry in entries:
            with selection.guard(names[entry.index]):
                if card.episodes.on_bad == "skip":
                    require_files(self._files, [entry], keys)
                if kept is not None:
                    place = kept[entry.index]
                else:
                    if entry.data not in indices:  # episodes of a file follow one another
                        table = self._files.table(entry.data, index.COLUMNS, few=self._few)
                        indices = {entry.data: index.FileIndex(entry.data, table)}
                    place = places[entry.index] = indices[entry.data].episode(entry, meta, tolerance_s)
                stated.require(entry, place.times_s, lambda e=entry, p=place: self._number(e.data, p.first))
                rows, task = _Rows(entry, place.first, place.times_s), meta.task(place.task, entry)
                if not self._succeeds(rows):
                    selection.fails(names[entry.index])
                    continue
                if card.episodes.on_bad == "skip":  # else columns are read when they are needed
                    for column in (card.robot.state, card.robot.action):
                        self._cut(rows, column)
                sentence = self._sentence(task, entry)
                self._rows.append(rows)
                infos.append(EpisodeInfo(names[entry.index], task, sentence, entry.length))
        self.left_out = selection.finish(f"{root}", len(infos))
        self.episodes = tuple(infos)
        if not self._files.in_place:
            for path in self.files():
                self._files.fetch(path)
        if key and kept is None:
            index.save(key, entries, places)

    def _index_key(self, entries: Sequence[Entry], allowed: Sequence[object]) -> str:
        """Return the key of the index on disk; empty where none is worth it, or a file is missing."""
        keys = [camera.key for camera in self.card.robot.cameras]
        paths = dict.fromkeys(entry.data for entry in entries)
        fewest = 1 if self._files.in_place else index.FEWEST
        if self.card.episodes.on_bad == "skip" or len(paths) < fewest:
            return ""
        paths |= dict.fromkeys(
            entry.videos[key].path for key in keys for entry in entries if key in entry.videos
        )
        try:
            stamps = {path: self._files.stamp(path) for path in paths}
        except DataError:  # which one, and for which episode, is said where each is required
            return ""
        self._files.expect(stamps)
        return index.key_of(entries, self._meta.fps, allowed, stamps)

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._cut(self._rows[self.require_episode(episode)], self.card.robot.state)

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._cut(self._rows[self.require_episode(episode)], self.card.robot.action)

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        return self.images(episode, [step], camera)[0]

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        declared = self.card.robot.cameras[self.camera_slot(camera)]
        steps = self.require_steps(episode, steps)
        if not steps:
            return self.no_frames(camera)
        rows = self._rows[episode]
        read = self._video_frames if declared.key in rows.entry.videos else self._image_rows
        ordered = sorted(set(steps))
        frames = dict(zip(ordered, read(rows, ordered, declared), strict=True))
        shape = (declared.height, declared.width, 3)
        for step, frame in frames.items():
            if frame.shape != shape:
                raise DataError(
                    f"{self._where(rows)}, step {step}: {declared.key} is {frame.shape}, the card "
                    f"says {shape}, as info.json does; correct the shape in both"
                )
        several = np.stack([frames[step] for step in steps]) if len(steps) != 1 else frames[steps[0]][None]
        stacked = declared.upright(several)
        stacked.flags.writeable = False
        return stacked

    def files(self) -> tuple[Path, ...]:
        paths = {rows.entry.data for rows in self._rows}
        for camera in self.card.robot.cameras:
            paths |= {r.entry.videos[camera.key].path for r in self._rows if camera.key in r.entry.videos}
        return (self._meta.root / "meta" / "info.json", *sorted(paths))

    def unnamed_files(self) -> list[str]:
        return unnamed(self._files, self._meta)

    def success_key(self) -> str:
        return success_feature(self._meta.features)

    def recorded_statistics(self) -> RecordedStatistics:
        used, all_of_them = len(self._rows), len(self._meta.episodes)
        if used != all_of_them:
            return RecordedStatistics(
                reason=f"{used} of its {all_of_them} episodes are used, and its statistics are of all"
            )
        try:
            return read_statistics(self._meta, self.card.robot)
        except DataError:
            paths = [self._meta.root / name for name in (WHOLE, BY_EPISODE)]
            again = [self._files.fetch_again(path) for path in paths if path.is_file()]
            if not any(again):
                raise
            return read_statistics(self._meta, self.card.robot)

    def stamps(self) -> list[tuple[Path, Stamp]]:
        return [(path, self._files.stamp(path)) for path in self.files()]

    def ahead(self) -> int:
        return self._files.limit()

    def files_of(self, episode: int) -> list[tuple[Path, int]]:
        entry, cameras = self._rows[self.require_episode(episode)].entry, self.card.robot.cameras
        paths = {entry.videos[c.key].path: None for c in cameras if c.key in entry.videos}
        return [(path, self._files.stamp(path)[0]) for path in [*paths, entry.data]]

    def copy_ahead(self, path: Path) -> None:
        self._files.prefetch(path)

    def close(self) -> None:
        self._videos.close()
        self._images.close()
        self._columns.clear()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_videos": None, "_images": None, "_columns": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._videos = VideoFiles(OPEN_VIDEOS)
        self._images = ImageColumns(IMAGE_BYTES)
        self._columns: LruCache[tuple[object, ...], _Column] = LruCache(
            COLUMN_BYTES, size=lambda column: column.values.nbytes, least=2
        )
        self._times: dict[tuple[int, str], list[float]] = {}  # of irregular episodes

    def _where(self, rows: _Rows) -> str:
        return f"{rows.entry.data}: episode {rows.entry.index}"

    def _sentence(self, task: str, entry: Entry) -> str:
        if self.card.instruction.source == "card":
            return self.card.instruction.sentence(task, f"{entry.data}: episode {entry.index}")
        entry.require_task(task)
        if not task.strip():
            raise DataError(
                f"{entry.data}: episode {entry.index} has an empty task; write the sentence in a card "
                '(instruction.source = "card")'
            )
        return task

    def _number(self, path: Path, row: int) -> int | None:
        """Return what the column "index" of a data file has in a row; None if there is no such column."""
        if "index" not in self._meta.features:
            return None
        return int(
            as_rows(self._files.table(path, ["index"], few=self._few)["index"], 1, f"{path}: index")[row, 0]
        )

    def _cut(self, rows: _Rows, column: ColumnCard) -> NDArray[np.float32]:
        some = slice(rows.first, rows.first + rows.entry.length)
        path = rows.entry.data
        whole = self._columns.get(_at(path, column), lambda: self._read_both(path, column))
        if whole.bad is not None and whole.bad[some].any():
            keys = self._parsed(column)
            values = _joined(self._read(path, [key.path for key in keys]), keys)[some]
            step, dimension = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise DataError(
                f"{self._where(rows)}: {', '.join(column.keys)} holds {values[step, dimension]} at step "
                f"{step}, dimension {dimension}; fix the file, or leave the episode out (skip in the card)"
            )
        return whole.values[some]

    def _read_both(self, path: Path, wanted: ColumnCard) -> _Column:
        """Read state and action of all episodes of a file, because opening it takes longer than reading."""
        columns = (self.card.robot.state, self.card.robot.action)
        names = dict(zip(reversed(columns), ("action", "state"), strict=True))  # they may be equal
        keys = {column: self._parsed(column) for column in columns}
        raw = self._read(path, dict.fromkeys(key.path for column in columns for key in keys[column]))
        made: dict[ColumnCard, _Column] = {}
        for column in columns:
            for key in keys[column]:
                require_scale(raw[key.path], column, names[column], key.path, str(path))
            values = _joined(raw, keys[column])
            bad: NDArray[np.bool_] = np.logical_not(np.isfinite(values).all(axis=1))
            rows = scaled(values, column)
            rows.flags.writeable = False
            made[column] = _Column(rows, bad if bad.any() else None)
            if column != wanted:
                self._columns.get(_at(path, column), lambda column=column: made[column])
        return made[wanted]

    def _parsed(self, column: ColumnCard) -> list[Key]:
        return [parse_key(key, str(self._meta.root)) for key in column.keys]

    def _succeeds(self, rows: _Rows) -> bool:
        key, path = self.card.episodes.success, rows.entry.data
        if not key:
            return True
        self._meta.feature(key, "episodes.success")
        column = self._columns.get((path, key), lambda: _Column(self._read(path, [key])[key], None))
        values = column.values[rows.first : rows.first + rows.entry.length]
        return is_success(values, f"{self._where(rows)}: episodes.success: {key}")

    def _read(self, path: Path, keys: Iterable[str]) -> dict[str, NDArray]:
        """Read features of all rows of a file, each [n, d], as they are stored."""
        table, read = self._files.table(path, list(keys), few=self._few), {}
        for key in keys:
            width = width_of(self._meta.features[key], key, self._meta.root)
            raw = as_rows(table[key], width, f"{path}: {key}")
            with np.errstate(over="ignore"):
                values = raw.astype(np.float32)
            huge = np.isinf(values) & np.isfinite(raw)
            if huge.any():
                row, dimension = (int(i) for i in np.argwhere(huge)[0])
                raise DataError(
                    f"{path}: {key} holds {raw[row, dimension]} in row {row}, dimension {dimension}, which "
                    "is beyond float32 (3.4e38); fix the file"
                )
            read[key] = raw
        return read

    def _video_frames(self, rows: _Rows, steps: Sequence[int], camera: CameraCard) -> list[NDArray[np.uint8]]:
        video = rows.entry.videos[camera.key]
        fps = self._meta.fps
        if rows.times_s is None:  # whole frames of the file, so that rounding never adds up
            wanted = [round((video.start_s + step / fps) * fps) / fps for step in steps]
        else:
            irregular = rows.times_s
            times = self._reading(video.path, lambda: self._irregular(rows, camera, irregular))
            wanted = [times[step] for step in steps]

        def read() -> list[NDArray[np.uint8]]:
            file = self._videos.get(video.path)
            self._places.require_fit(rows.entry, camera.key, file)
            return file.read(wanted, 0.5 / fps)

        try:
            return self._reading(video.path, read)
        except DataError as error:
            raise DataError(
                f"{error}; episode {rows.entry.index}, {camera.key}, steps {ranges(steps)}"
            ) from error

    def _reading(self, path: Path, read: Callable[[], T]) -> T:
        """Return what `read` reads of a file, which is copied before if it is not here."""
        for _ in range(ATTEMPTS):
            if self._files.fetch(path):  # the disk only has the room of deleted files once they are closed
                self._videos.close()
                self._images.close_files()
            try:
                return read()
            except (DataError, OSError) as error:
                if path.exists() and not self._files.fetch_again(path):
                    if copy := self._files.copy_of(path):
                        raise DataError(f"{error}{copy}") from error
                    raise
                self._videos.close()
                self._images.close()
        raise DataError(f"{path}: is deleted by other processes before it can be read; enlarge the cache")

    def _irregular(self, rows: _Rows, camera: CameraCard, stamps: NDArray[np.float64]) -> list[float]:
        """Return when each frame of an episode with irregular `stamps` is in its video."""
        key = (rows.entry.index, camera.key)
        if key in self._times:
            return self._times[key]
        video = rows.entry.videos[camera.key]
        every = np.asarray(self._videos.get(video.path).times())
        first = int(np.abs(every - video.start_s).argmin()) if len(every) else 0
        where = f"{video.path}: episode {rows.entry.index} of {rows.entry.data}"
        self._times[key] = frame_times(every[first:], stamps, self._meta.fps, where)
        return self._times[key]

    def _image_rows(self, rows: _Rows, steps: Sequence[int], camera: CameraCard) -> list[NDArray[np.uint8]]:
        frames = []
        path = rows.entry.data
        for step in steps:
            row = rows.first + step
            where = f"{self._where(rows)}, step {step}, {camera.key}"

            def read(row: int = row, where: str = where) -> NDArray[np.uint8] | str:
                data, name = self._images.row(path, camera.key, row)
                return name if data is None else decode_image(data, where)

            frame = self._reading(path, read)
            if isinstance(frame, str):
                own = file_below(self._meta.root, frame, f"{where}: the image is in {frame!r}")
                self._files.require(own)
                frame = self._reading(own, lambda own=own, at=where: decode_image(plain_bytes(own), at))
            frames.append(frame)
        return frames


def _at(path: Path, column: ColumnCard) -> tuple[object, ...]:
    return path, column.keys, column.scale, column.offset  # state and action may share their keys


def _joined(raw: Mapping[str, NDArray], keys: Sequence[Key]) -> NDArray:
    parts = [raw[key.path][:, key.some] for key in keys]
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
