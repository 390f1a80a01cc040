"""Write a dataset as LeRobot v3.0: columns and PNG in parquet, or frames as video."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlafit import files
from vlafit.datasets.convert.lerobot_frames import VIDEO_CODECS, FilmWriter, png
from vlafit.datasets.convert.lerobot_stats import NAMES, PixelCounts, flat, in_order, of_rows
from vlafit.datasets.convert.written import Written, card_for
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

__all__ = ["VIDEO_CODECS", "write_lerobot"]

CHUNK_FILES = 1000  # files of a chunk folder, as LeRobot has it
DATA_MB = 100
VIDEO_MB = 200
ALL_AT_ONCE = 64  # frames held in memory
PREFIX = "observation.images."
STATE, ACTION = "observation.state", "action"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_lerobot(store: EpisodeStore, folder: Path, video: str, progress: Callable[[int], None]) -> Written:
    """Write the episodes into `folder` in the order of the store, as PNG or as `video`."""
    writer = _Writer(store, folder, video, progress)
    for number in range(len(store.episodes)):
        writer.add(number)
    writer.finish()
    cameras = {camera.name: PREFIX + camera.name for camera in store.embodiment.cameras}
    card = card_for(store, "lerobot", cameras, STATE, ACTION, "task")
    lost = []
    if any(info.seed is not None for info in store.episodes):
        lost.append("the seeds of the episodes: `vlafit data replay` cannot restore their starts")
    tasks, sentences = ({getattr(i, name) for i in store.episodes} for name in ("task", "instruction"))
    if len(tasks) > len(sentences):
        lost.append(f"{len(tasks)} tasks of {len(sentences)} sentences: tasks of one sentence become one")
    if video:
        lost.append(f"pixels: {video} is lossy")
    return Written(card, tuple(range(len(store.episodes))), tuple(lost))


class _Writer:
    """Writes episode after episode, then the metadata."""

    def __init__(
        self, store: EpisodeStore, folder: Path, video: str, progress: Callable[[int], None]
    ) -> None:
        self.store, self.folder, self.video, self.progress = store, folder, video, progress
        self.fps = _whole_rate(store)
        self.cameras = [camera.name for camera in store.embodiment.cameras]
        self.tasks = {text: n for n, text in enumerate(dict.fromkeys(e.instruction for e in store.episodes))}
        self.features = _features(store, self.fps, video)
        self.schema = _data_schema(self.features)
        self.pixels = {name: PixelCounts() for name in self.cameras}
        self.films = {
            name: FilmWriter(folder / "videos" / (PREFIX + name), video, self.fps, VIDEO_MB, CHUNK_FILES)
            for name in (self.cameras if video else ())
        }
        self.episodes: list[dict[str, Any]] = []
        self.columns: dict[str, list[NDArray]] = {key: [] for key in (STATE, ACTION, *BOOKKEEPING)}
        self._file = -1
        self._data: pq.ParquetWriter | None = None
        self._path = folder
        self._total = self._frames = 0

    def add(self, number: int) -> None:
        """Write an episode."""
        info = self.store.episodes[number]
        steps = np.arange(info.length)
        columns: dict[str, NDArray] = {
            STATE: self.store.state(number),
            ACTION: self.store.actions(number),
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(info.length, number),
            "index": self._total + steps,
            "task_index": np.full(info.length, self.tasks[info.instruction]),
        }
        stats: dict[str, Mapping[str, NDArray]] = {}
        images: dict[str, pa.Array] = {}
        places: dict[str, Any] = {}
        for name in self.cameras:
            counts, encoded, place = self._frames_of(number, name)
            stats[PREFIX + name] = counts.stats()
            self.pixels[name].merge([counts])
            if encoded:
                images[PREFIX + name] = pa.array(encoded, IMAGE)
            places |= place
        for key, values in columns.items():
            rows = values.reshape(info.length, -1)
            stats[key] = of_rows(rows)
            self.columns[key].append(rows)
        arrays = [
            images[field.name] if field.name in images else _as_column(columns[field.name], field.type)
            for field in self.schema
        ]
        self._data_writer().write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        chunk, file = divmod(self._file, CHUNK_FILES)
        self.episodes.append(
            {
                "episode_index": number,
                "tasks": [info.instruction],
                "length": info.length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self._total,
                "dataset_to_index": self._total + info.length,
                **places,
                **flat(stats, list(self.features)),
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._total += info.length

    def finish(self) -> None:
        """Close the files and write the metadata."""
        if self._data is not None:
            self._data.close()
        for film in self.films.values():
            film.close()
        meta = self.folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        table = pa.Table.from_pylist(
            self.episodes, schema=_episodes_schema(self.features, self.cameras, self.video)
        )
        pq.write_table(table, meta / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(_tasks_table(self.tasks), meta / "tasks.parquet")
        stats = {PREFIX + name: counts.stats() for name, counts in self.pixels.items()}
        stats |= {key: of_rows(np.concatenate(parts)) for key, parts in self.columns.items()}
        whole = {key: in_order(values) for key, values in stats.items()}
        files.write_atomic(meta / "stats.json", json.dumps(whole, indent=4))
        files.write_atomic(meta / "info.json", json.dumps(self._info(), indent=4))

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "fps": self.fps,
            "features": self.features,
            "total_episodes": len(self.episodes),
            "total_frames": self._total,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "data_path": f"data/{PLACE}.parquet",
            "video_path": f"videos/{{video_key}}/{PLACE}.mp4" if self.video else None,
            "robot_type": self.store.embodiment.name,
            "splits": {"train": f"0:{len(self.episodes)}"},
        }

    def _frames_of(
        self, number: int, camera: str
    ) -> tuple[PixelCounts, list[dict[str, Any]], dict[str, Any]]:
        """Encode the frames of an episode; return their counts, pictures of rows, and place in a video."""
        info, counts = self.store.episodes[number], PixelCounts()
        encoded: list[dict[str, Any]] = []
        film = self.films.get(camera)
        place = film.begin() if film else None
        for first in range(0, info.length, ALL_AT_ONCE):
            steps = range(first, min(first + ALL_AT_ONCE, info.length))
            frames = self.store.images(number, steps, camera)
            counts.add(frames)
            if film:
                film.add(frames, f"dataset {self.store.card.name!r}: camera {camera!r}")
            else:
                encoded += [
                    {"bytes": png(frame), "path": f"frame-{step:06d}.png"}
                    for step, frame in zip(steps, frames, strict=True)
                ]
            self._frames += len(steps)
            self.progress(self._frames)
        if place is None:
            return counts, encoded, {}
        at = f"videos/{PREFIX}{camera}"
        return (
            counts,
            encoded,
            {
                f"{at}/chunk_index": place.chunk,
                f"{at}/file_index": place.file,
                f"{at}/from_timestamp": place.first_frame / self.fps,
                f"{at}/to_timestamp": (place.first_frame + info.length) / self.fps,
            },
        )

    def _data_writer(self) -> pq.ParquetWriter:
        """Return the writer of the present data file, or of the next if that is large enough."""
        if self._data is None or self._path.stat().st_size > DATA_MB * 2**20:
            if self._data is not None:
                self._data.close()
            self._file += 1
            chunk, file = divmod(self._file, CHUNK_FILES)
            self._path = self.folder / "data" / f"{PLACE.format(chunk_index=chunk, file_index=file)}.parquet"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(self._path, self.schema)
        return self._data


def _whole_rate(store: EpisodeStore) -> int:
    hz = store.embodiment.hz
    if not hz > 0 or hz != int(hz):
        raise DataError(
            f"dataset {store.card.name!r}: its rate is {hz:g} Hz, and LeRobot's fps is a whole number above "
            "0; resample the dataset, or keep it in its own layout"
        )
    return int(hz)


def _features(store: EpisodeStore, fps: int, video: str) -> dict[str, Any]:
    """Return the features of info.json."""
    robot = store.embodiment
    features: dict[str, Any] = {}
    for camera in robot.cameras:
        height, width, _ = camera.shape
        feature: dict[str, Any] = {
            "dtype": "video" if video else "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if video:
            codec = VIDEO_CODECS[video]
            feature["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": video,
                "video.pix_fmt": "yuv420p",
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
                "video.g": int(codec.options["g"]),
                "video.crf": int(codec.options["crf"]),
                "is_depth_map": False,
            }
        features[PREFIX + camera.name] = feature
    for key, column in ((STATE, robot.state), (ACTION, robot.action)):
        names = list(column.labels) or None
        features[key] = {"dtype": "float32", "shape": list(column.shape), "names": names}
    for key in BOOKKEEPING:
        kind = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": kind, "shape": [1], "names": None}
    return features


def _data_schema(features: Mapping[str, Any]) -> pa.Schema:
    """Return the schema of the data files, with what the library `datasets` keeps of it."""
    fields, described = [], {}
    for key, feature in features.items():
        match feature["dtype"]:
            case "video":
                continue
            case "image":
                fields.append(pa.field(key, IMAGE))
                described[key] = {"_type": "Image"}
            case dtype:
                value = {"dtype": dtype, "_type": "Value"}
                kind: pa.DataType = pa.float32() if dtype == "float32" else pa.int64()
                if key in (STATE, ACTION):
                    width = feature["shape"][0]
                    kind = pa.list_(pa.field("element", kind), width)
                    value = {"feature": value, "length": width, "_type": "List"}
                fields.append(pa.field(key, kind))
                described[key] = value
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pa.schema(fields, metadata)


def _episodes_schema(features: Mapping[str, Any], cameras: Sequence[str], video: str) -> pa.Schema:
    whole, real = pa.int64(), pa.float64()
    fields = [("episode_index", whole), ("tasks", _list(pa.string())), ("length", whole)]
    fields += [(name, whole) for name in ("data/chunk_index", "data/file_index")]
    fields += [(name, whole) for name in ("dataset_from_index", "dataset_to_index")]
    for camera in cameras if video else ():
        at = f"videos/{PREFIX}{camera}"
        fields += [(f"{at}/chunk_index", whole), (f"{at}/file_index", whole)]
        fields += [(f"{at}/from_timestamp", real), (f"{at}/to_timestamp", real)]
    for key, feature in features.items():
        picture = feature["dtype"] in ("image", "video")
        for name in NAMES:
            kind = _list(_list(_list(real))) if picture else _list(real)
            fields.append((f"stats/{key}/{name}", _list(whole) if name == "count" else kind))
    fields += [(name, whole) for name in ("meta/episodes/chunk_index", "meta/episodes/file_index")]
    return pa.schema(fields)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))


def _as_column(values: NDArray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), type=kind)
    return pa.array(values, kind)


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """Return the table of tasks. LeRobot looks a task up in the index that pandas makes of this metadata."""
    described = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [{**column, "metadata": None} for column in described],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
