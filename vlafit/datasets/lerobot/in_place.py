"""A LeRobot dataset that is read where it is: each file is copied when a window needs it.

The copies are in `in_place` of vlafit's cache, which has a limited size (see `bounded_cache`). Only metadata
is copied when the dataset is opened, and of tables that hold images only the columns that are asked for are
read. A file that was written again since the dataset was opened is an error.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlafit.datasets.bounded_cache import SIZE_SWITCH, BoundedCache, chosen_limit
from vlafit.datasets.downloads import ChangedError, Wait, announce_in_place, as_text, attempts
from vlafit.datasets.lerobot.files import DatasetFiles
from vlafit.datasets.lerobot.meta import read_meta
from vlafit.datasets.lerobot.tables import DamagedError, read_columns, read_table
from vlafit.datasets.listing import LISTED, Listing, Storage
from vlafit.datasets.stamps import Stamp
from vlafit.datasets.storage import RemoteFile, require_content, version_of
from vlafit.datasets.web_files import NoRangesError
from vlafit.errors import DataError
from vlafit.files import require_writable, write_atomic

META = "meta/"
AT_ONCE = 8  # files of the metadata
FIX = "Run the command again (a training run with --resume): files that are here are not copied again"


class FilesInPlace(DatasetFiles):
    """The files of a dataset at a URL; `root` is the folder of their copies."""

    in_place = True

    def __init__(self, listing: Listing, place: Path, wait: Wait = time.sleep) -> None:
        """Copy the metadata. `place` is the folder of all copies; `wait` is called before another attempt.

        Raises DataError naming a file that cannot be copied.
        """
        self.url = listing.url
        self._listing, self._wait = listing, wait
        self._files = dict(listing.files)
        self._copied_again: set[Path] = set()
        self._reset()
        cache = BoundedCache(require_writable(place), 0)
        self._cache = BoundedCache(place, chosen_limit(place, cache.used()))
        meta = {name: file for name, file in self._files.items() if name.startswith(META)}
        facts = [self.url, sorted((name, file.size, file.version) for name, file in meta.items())]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.root = place / key / self.url.rsplit("/", 1)[-1].split("@")[0]
        self._deleted = self._cache.deleted_since(0)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: self.fetch(self.root / name), sorted(meta)))
        self._keep()
        self._require_metadata(sorted(meta))

    def _require_metadata(self, names: Sequence[str]) -> None:
        """Read the metadata; if it is damaged, copy it once more."""
        try:
            read_meta(self.root)
        except DataError:
            for name in names:
                self.fetch_again(self.root / name)
            try:
                read_meta(self.root)
            except DataError as error:
                raise DataError(f"{error}{self.copy_of(self.root / META)}") from error

    def _look_up(self, paths: Collection[Path]) -> None:
        """Find size and version of files that the storage has not listed."""
        names = {self._name(path) for path in paths} - self._files.keys()
        if self._listing.look_up is not None and names:
            self._files |= self._listing.look_up(names)
            self._keep()

    def stamp(self, path: Path) -> Stamp:
        file = self._file(path)
        seconds = int.from_bytes(hashlib.sha256(file.version.encode()).digest()[:4]) // 4
        return file.size, seconds * 10**9

    def require(self, path: Path) -> None:
        if not self._file(path).size:
            raise DataError(f"{self._file(path).path}: is empty; complete the dataset")

    def expect(self, stamps: Mapping[Path, Stamp]) -> None:
        pass  # each file is compared with the listing when it is copied

    def fetch(self, path: Path) -> bool:
        file = self._file(path)
        copied = self._cache.get(path, self.stamp(path), lambda target: self._copy(file, target))
        before, self._deleted = self._deleted, self._cache.deleted_since(self._deleted)
        return copied or self._deleted != before

    def fetch_again(self, path: Path) -> bool:
        if path in self._copied_again:
            return False
        self._copied_again.add(path)
        path.unlink(missing_ok=True)
        self.fetch(path)
        return True

    def copy_of(self, path: Path) -> str:
        return (
            f" ({path} is a copy of {self.url}/{self._name(path)}, which was copied twice: look at what is "
            "there; to have it copied anew, delete the copy)"
        )

    def names(self, root: Path, folder: str, suffix: str) -> list[str]:
        return [name for name in self._files if name.startswith(f"{folder}/") and name.endswith(suffix)]

    def table(self, path: Path, columns: Sequence[str], *, few: bool) -> pa.Table:
        if few and not path.is_file():
            try:
                return self._some_columns(self._file(path), columns)
            except NoRangesError:
                pass  # so the whole file is copied
        for _ in range(3):
            self.fetch(path)
            try:
                return read_table(path, columns)
            except DamagedError as error:
                if path.exists() and not self.fetch_again(path):
                    raise DataError(f"{error}{self.copy_of(path)}") from error
            except DataError:
                if path.exists():
                    raise
        raise DataError(f"{path}: is deleted by other processes before it can be read; enlarge {SIZE_SWITCH}")

    def prefetch(self, path: Path) -> None:
        self.fetch(path)

    def limit(self) -> int:
        return self._cache.limit // 2  # the rest is for what is in use

    def announce(self, episodes: Sequence[Sequence[Path]]) -> None:
        """Log how large the files of the `episodes` are and how much of them is kept.

        Raises DataError if those of one episode are larger than the cache.
        """
        self._look_up({path for paths in episodes for path in paths})
        sizes = {
            path: self.stamp(path)[0]
            for paths in episodes
            for path in paths
            if self._name(path) in self._files
        }
        cache, size = self._cache, sum(sizes.values())
        announce_in_place(self.url, len(sizes), size, cache.limit, SIZE_SWITCH, cache.used(), cache.folder)
        most = max((sum(sizes.get(path, 0) for path in paths) for paths in episodes), default=0)
        if most > cache.limit:
            raise DataError(
                f"{self.url}: one episode is in files of {as_text(most)}, more than the "
                f"{as_text(cache.limit)} that are kept at {cache.folder}; set {SIZE_SWITCH} to more"
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_storage": None, "_process": 0}

    def _reset(self) -> None:
        self._storage: Storage | None = None
        self._process = 0  # that opened the connection

    def _connected(self) -> Storage:
        if self._storage is None or self._process != os.getpid():
            self._storage, self._process = self._listing.connect(), os.getpid()
        return self._storage

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _file(self, path: Path) -> RemoteFile:
        file = self._files.get(self._name(path))
        if file is None:
            raise DataError(f"{self.url}: {self._name(path)} is missing; complete the dataset")
        return file

    def _copy(self, file: RemoteFile, target: Path) -> None:
        def copy() -> None:
            self._connected().get_file(file.path, str(target))
            self._require_same(file)
            require_content(target, file)

        attempts(file.path, copy, FIX, self._wait)

    def _some_columns(self, file: RemoteFile, columns: Sequence[str]) -> pa.Table:
        def read(start: int, end: int) -> bytes:
            data = self._connected().cat_file(file.path, start, end)
            if len(data) != end - start:
                raise ConnectionError(f"{len(data):,} bytes arrived of {end - start:,}")
            return data

        def read_again(start: int, end: int) -> bytes:
            return attempts(file.path, lambda: read(start, end), FIX, self._wait)

        try:
            remote = pq.ParquetFile(_Ranges(read_again, file.size), pre_buffer=True)
            table = read_columns(remote, file.path, columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path}: is no whole parquet file ({error})") from error
        self._require_same(file)
        return table

    def _require_same(self, file: RemoteFile) -> None:
        """Raise ChangedError if the storage has another version now than when it was listed."""
        if self._listing.pinned:
            return

        def look_up() -> Mapping[str, Any]:
            storage = self._connected()
            getattr(storage, "invalidate_cache", lambda: None)()
            return storage.info(file.path)

        now = attempts(file.path, look_up, FIX, self._wait)
        if (now.get("size"), version_of(now)) != (file.size, file.version):
            raise ChangedError(
                f"{file.path}: changed since the dataset was opened; run the command again once nothing is "
                "written there"
            )

    def _keep(self) -> None:
        files = {name: astuple(file) for name, file in sorted(self._files.items())}
        facts = {"url": self.url, "files": files}
        write_atomic(self.root.parent / LISTED, json.dumps(facts))


class _Ranges(io.RawIOBase):
    """A file that is read by ranges of bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read_range(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)
