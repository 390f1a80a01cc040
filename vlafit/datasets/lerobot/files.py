"""The files of a LeRobot dataset: in a folder, or elsewhere, from where each is copied when it is read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from vlafit.datasets.lerobot.meta import Entry, Meta
from vlafit.datasets.lerobot.tables import read_table, require_file
from vlafit.datasets.stamps import Stamp, Stamps, stamp
from vlafit.errors import DataError


class DatasetFiles(ABC):
    """Files by their paths below one folder. Each is asked for with `fetch` before every read of it."""

    in_place = False
    """Whether files are copied when they are read, and may be deleted again."""

    @abstractmethod
    def stamp(self, path: Path) -> Stamp:
        """Return size in bytes and a time that changes with the file. Raises DataError if it is missing."""

    @abstractmethod
    def require(self, path: Path) -> None:
        """Raise DataError unless there is such a file."""

    @abstractmethod
    def expect(self, stamps: Mapping[Path, Stamp]) -> None:
        """Take these stamps for those that the files must keep."""

    @abstractmethod
    def fetch(self, path: Path) -> bool:
        """Have a file ready to be opened; return whether files that are open may be deleted by now.

        Raises DataError if it changed since the dataset was opened, or cannot be had.
        """

    def fetch_again(self, path: Path) -> bool:
        """Copy a file anew that cannot be read, once for each file; return whether that was done."""
        return False

    def copy_of(self, path: Path) -> str:
        """Return of what a file is a copy, for the end of a message; "" if it is none."""
        return ""

    @abstractmethod
    def names(self, root: Path, folder: str, suffix: str) -> list[str]:
        """Return the files below a folder of `root` that end so, by their names in `root`."""

    @abstractmethod
    def table(self, path: Path, columns: Sequence[str], *, few: bool) -> pa.Table:
        """Read columns of a parquet file, which are a `few` of its bytes, or most.

        Raises DataError naming a column that is missing, or the damage.
        """

    def prefetch(self, path: Path) -> None:  # noqa: B027
        """Copy a file that will be read soon, if that is not done."""

    def limit(self) -> int:
        """Return the bytes of which `prefetch` may copy ahead; 0 if there is nothing to copy."""
        return 0


class LocalFiles(DatasetFiles):
    """Files of a folder."""

    def __init__(self) -> None:
        self._stamps = Stamps()

    def stamp(self, path: Path) -> Stamp:
        return stamp(path)

    def require(self, path: Path) -> None:
        require_file(path)

    def expect(self, stamps: Mapping[Path, Stamp]) -> None:
        self._stamps = Stamps(stamps)

    def fetch(self, path: Path) -> bool:
        self._stamps.require_unchanged(path)
        return False

    def names(self, root: Path, folder: str, suffix: str) -> list[str]:
        found = (root / folder).rglob(f"*{suffix}")
        return [path.relative_to(root).as_posix() for path in found if path.is_file()]

    def table(self, path: Path, columns: Sequence[str], *, few: bool) -> pa.Table:
        self._stamps.require_unchanged(path)
        return read_table(path, columns)


def require_files(files: DatasetFiles, entries: Sequence[Entry], cameras: Sequence[str]) -> None:
    """Raise DataError naming the files of the rows and `cameras` of episodes that are missing."""
    wanted: dict[Path, str] = {}
    for entry in entries:
        wanted.setdefault(entry.data, f"episode {entry.index}")
        for key in cameras:
            if key in entry.videos:
                wanted.setdefault(entry.videos[key].path, f"episode {entry.index}, {key}")
    faults = []
    for path, what in wanted.items():
        try:
            files.require(path)
        except DataError as error:
            faults.append(f"{error} ({what})")
    raise_first(faults)


def raise_first(faults: Sequence[str], most: int = 5) -> None:
    """Raise DataError with the first faults and the number of the others, if there are any."""
    if faults:
        more = f"\nand {len(faults) - most} more" if len(faults) > most else ""
        raise DataError("\n".join(faults[:most]) + more)


def unnamed(files: DatasetFiles, meta: Meta) -> list[str]:
    """Return the files of data/ and videos/ that no episode of the metadata is in, by name."""
    named = {entry.data for entry in meta.episodes}
    named |= {video.path for entry in meta.episodes for video in entry.videos.values()}
    there = [*files.names(meta.root, "data", ".parquet"), *files.names(meta.root, "videos", ".mp4")]
    hidden = [name for name in there if Path(name).name.startswith(".")]  # of an operating system
    return sorted(name for name in there if meta.root / name not in named and name not in hidden)
