"""The metadata of a LeRobot dataset of any format: its features, tasks, and where each episode is."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlafit.datasets.lerobot.tables import open_parquet, read_table, require_file
from vlafit.datasets.stamps import stamp
from vlafit.errors import DataError, brief, did_you_mean
from vlafit.files import parse_json, plain_text, read_json_object, require_regular_files

VERSIONS = ("v2.0", "v2.1", "v3.0")
RANGE = ("dataset_from_index", "dataset_to_index")  # of an episode's rows among all rows
WIDTH = re.compile(r"(0?\d{1,2}d?)?")  # of a number in a file's name


@dataclass(frozen=True)
class Video:
    """Where the frames of one camera of one episode are."""

    path: Path
    start_s: float
    """When the episode begins in the file."""
    end_s: float | None = None
    """When it ends there, where the metadata says so."""


@dataclass(frozen=True)
class Entry:
    """One episode, as the metadata describes it."""

    index: int
    """Its number in the whole dataset, which deleted episodes leave gaps in."""
    length: int
    data: Path
    videos: Mapping[str, Video]
    tasks: tuple[str, ...] = ()
    """Its sentences, where the list of episodes repeats them."""
    rows: tuple[int, int] | None = None
    """The numbers of its first row and of that behind its last one among all rows, where they are stated."""

    def require_task(self, task: str) -> None:
        """Raise DataError where the list of episodes contradicts `task`, that of the rows' task_index."""
        if self.tasks and " ".join(task.split()) not in {" ".join(text.split()) for text in self.tasks}:
            raise DataError(
                f"{self.data}: episode {self.index} has the task {task!r} by its task_index, and "
                f"{', '.join(map(repr, self.tasks))} in meta/episodes; correct the one that is wrong, or "
                'write the sentence in a card (instruction.source = "card")'
            )


@dataclass(frozen=True)
class Meta:
    """The metadata of a dataset."""

    root: Path
    version: str
    info: Mapping[str, Any]
    features: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[int, str]
    episodes: tuple[Entry, ...]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    def task(self, number: int, entry: Entry) -> str:
        """Return the sentence of a task_index. Raises DataError naming the episode if there is none."""
        if number not in self.tasks:
            raise DataError(
                f"{entry.data}: episode {entry.index}: task_index {number} is not among the "
                f"{len(self.tasks)} tasks in meta/"
            )
        return self.tasks[number]

    def feature(self, key: str, where: str, frames: bool = False) -> Mapping[str, Any]:
        """Return a feature of info.json.

        Raises DataError naming the nearest of its kind, with `frames` a camera's, if there is none.
        """
        if key not in self.features:
            near = [n for n, f in self.features.items() if (f.get("dtype") in ("image", "video")) == frames]
            raise DataError(f"{self.root}: {where}: no feature {key!r}{did_you_mean(key, near)}")
        return self.features[key]


def read_meta(root: Path) -> Meta:
    """Read `root`/meta. Raises DataError naming the file that is missing, damaged or contradicts another."""
    paths = sorted(path for path in (root / "meta").rglob("*") if path.is_file())
    return _read(root, tuple((path, *stamp(path)) for path in paths))


@lru_cache(maxsize=1)  # a card is drafted from it before its dataset is opened
def _read(root: Path, stamps: tuple[tuple[Path, int, int], ...]) -> Meta:
    """Read `root`/meta, whose files have these `stamps`."""
    info = read_json(root / "meta" / "info.json")
    for key, kind in (
        ("codebase_version", str),
        ("fps", int | float),
        ("features", dict),
        ("data_path", str),
    ):
        if not isinstance(info.get(key), kind):
            raise DataError(
                f"{root}/meta/info.json: {key} is {info.get(key)!r}; is this LeRobot's info.json?"
            )
    version = info["codebase_version"]
    if version not in VERSIONS:
        raise DataError(
            f"{root}/meta/info.json: codebase_version {version!r} is none of {', '.join(VERSIONS)}"
        )
    if not info["fps"] > 0:
        raise DataError(f"{root}/meta/info.json: fps is {info['fps']!r}, which must be above 0")
    new = (root / "meta" / "episodes").is_dir()
    require_regular_files(root / "meta", (".json", ".jsonl", ".parquet"))
    old = (root / "meta" / "episodes.jsonl").is_file()
    if not (new if version == "v3.0" else old):
        there = "meta/episodes.jsonl" if old else "meta/episodes/" if new else "neither is there"
        raise DataError(
            f"{root}: info.json says {version}, which has meta/"
            f"{'episodes/' if version == 'v3.0' else 'episodes.jsonl'}, but {there}; fetch the dataset again"
        )
    features = info["features"]
    videos = [key for key, feature in features.items() if feature.get("dtype") == "video"]
    if videos and not isinstance(info.get("video_path"), str):
        raise DataError(f"{root}/meta/info.json: video_path is missing, but {videos[0]} is a video")
    read = _episodes_v3 if version == "v3.0" else _episodes_v2
    tasks = _tasks_v3(root) if version == "v3.0" else _tasks_v2(root)
    try:
        episodes = tuple(sorted(read(root, info, videos), key=lambda entry: entry.index))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{root}/meta: the episodes cannot be read ({brief(error)})") from error
    return Meta(root, version, info, features, tasks, episodes)


def splits_of(meta: Meta) -> dict[str, str]:
    """Return the splits of info.json; none of one that is no table."""
    splits = meta.info.get("splits")
    return {str(k): str(v) for k, v in splits.items()} if isinstance(splits, Mapping) else {}


def require_totals(meta: Meta) -> None:
    """Raise DataError where info.json has other totals than the list of episodes."""
    frames = sum(entry.length for entry in meta.episodes)
    for key, counted in (("total_episodes", len(meta.episodes)), ("total_frames", frames)):
        stated = meta.info.get(key)
        if stated is not None and stated != counted:
            raise DataError(
                f"{meta.root}/meta/info.json: {key} is {stated!r}, but the episodes in meta/ are "
                f"{len(meta.episodes)} with {frames} frames together; fetch the dataset again, or correct it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if the file is missing or holds something else."""
    require_file(path)
    return read_json_object(path, DataError, "fetch it again")


def labels(names: Any) -> tuple[str, ...]:
    """Return the names of a feature's dimensions: a list, nested lists, or tables of them; none if null."""
    if isinstance(names, str):
        return (names,)
    if isinstance(names, Mapping):
        if names and all(isinstance(value, int) for value in names.values()):
            return tuple(sorted(names, key=lambda name: names[name]))
        names = list(names.values())
    if isinstance(names, Sequence):
        return tuple(label for name in names for label in labels(name))
    return ()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    require_file(path)
    rows = []
    for number, line in enumerate(plain_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); fetch it again") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def _tasks_v2(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.jsonl"
    return _as_tasks([(row.get("task_index"), row.get("task")) for row in _json_lines(path)], path)


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.parquet"
    table = read_table(path, None)
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if "task_index" not in table.column_names or not names:
        raise DataError(f"{path}: has columns {table.column_names}, needs task_index and task")
    pairs = zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True)
    return _as_tasks(list(pairs), path)


def _as_tasks(pairs: Sequence[tuple[Any, Any]], path: Path) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for number, text in pairs:
        if not isinstance(number, int) or not isinstance(text, str) or number in tasks:
            raise DataError(f"{path}: task_index {number!r} with the task {text!r} is invalid or twice there")
        tasks[number] = text
    return tasks


def _episodes_v2(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Entry]:
    size = int(info.get("chunks_size", 1000))
    if size < 1:
        raise ValueError(f"chunks_size in info.json is {size}")
    entries, places = [], _Places(root, info)
    for row in _json_lines(root / "meta" / "episodes.jsonl"):
        index = int(row["episode_index"])
        names = {"episode_chunk": index // size, "episode_index": index}
        films = {key: Video(places.get("video_path", names | {"video_key": key}), 0.0) for key in videos}
        data = places.get("data_path", names)
        entries.append(Entry(index, int(row["length"]), data, films, _texts(row.get("tasks"))))
    return entries


def _episodes_v3(root: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[Entry]:
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{root}/meta/episodes: holds no parquet file; fetch the dataset again")
    entries, places = [], _Places(root, info)
    for path in paths:
        wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in videos:
            wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        present = set(open_parquet(path).schema_arrow.names)
        ends = [name for name in (f"videos/{key}/to_timestamp" for key in videos) if name in present]
        ranges = [*RANGE] if present.issuperset(RANGE) else []
        wanted += [*ends, *ranges]
        for row in read_table(path, [*wanted, *{"tasks"} & present]).to_pylist():
            missing = [name for name in wanted if row[name] is None]
            if missing:
                raise DataError(f"{path}: episode {row['episode_index']} has no {', '.join(missing)}")
            films = {}
            for key in videos:
                at = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                start, end = (row.get(f"videos/{key}/{name}_timestamp") for name in ("from", "to"))
                if not all(at_s is None or 0 <= at_s < float("inf") for at_s in (start, end)):
                    raise DataError(
                        f"{path}: episode {row['episode_index']}: videos/{key} is from {start} to {end} s, "
                        "which is no window of a video; fetch it again, or correct it"
                    )
                video = places.get("video_path", at | {"video_key": key})
                films[key] = Video(video, float(start), None if end is None else float(end))
            at = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
            data = places.get("data_path", at)
            texts = _texts(row.get("tasks"))
            stated = (int(row[RANGE[0]]), int(row[RANGE[1]])) if ranges else None
            entries.append(Entry(row["episode_index"], row["length"], data, films, texts, stated))
    return entries


def _texts(tasks: Any) -> tuple[str, ...]:
    """Return the sentences that a list of episodes has for one of them; none where it has no list."""
    return tuple(text for text in tasks if isinstance(text, str)) if isinstance(tasks, list) else ()


class _Places:
    """The files that the templates of info.json name; a dataset reads none outside its folder."""

    def __init__(self, root: Path, info: Mapping[str, Any]) -> None:
        self._root, self._info = root, info
        self._known: dict[tuple[object, ...], Path] = {}  # episodes of one file share its path
        self._harmless: set[tuple[object, ...]] = set()  # templates and cameras of which one path was checked

    def get(self, key: str, names: Mapping[str, object]) -> Path:
        """Return the file that the template at `key` names.

        Raises DataError for another place, and for a template that is more than names and their widths.
        """
        at = (key, *names.values())
        path = self._known.get(at)
        if path is None:
            numbers = all(isinstance(names[name], int) for name in names if name != "video_key")
            kind = (key, names.get("video_key"))
            if numbers and kind in self._harmless:  # numbers lead nowhere else
                path = Path(f"{self._root}/{self._info[key].format(**names)}")
            else:
                path = self._checked(key, names)
                self._harmless.add(kind)
            self._known[at] = path
        return path

    def _checked(self, key: str, names: Mapping[str, object]) -> Path:
        template = self._info[key]
        where = f"{self._root}/meta/info.json: {key} is {template!r}"
        for _, name, width, conversion in string.Formatter().parse(template):
            if name is not None and (name not in names or conversion or not WIDTH.fullmatch(width or "")):
                raise DataError(
                    f"{where}; between braces may be {', '.join(names)}, with a width such as :06d"
                )
        return file_below(self._root, template.format(**names), where)


def file_below(root: Path, name: str, where: str) -> Path:
    """Return the file that a dataset calls `name`. Raises DataError for one outside the dataset's folder."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where}, which leads out of the dataset's folder; copy the files into it")
    return root / relative
