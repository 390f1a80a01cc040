"""A folder of copied files with a limited size: beyond it, the least recently used files are deleted.

Several processes may use one folder. Whoever has a deleted file open can still read it; the disk is free
again once it is closed, so that readers close what was deleted (`BoundedCache.deleted_since`).
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vlafit import locks
from vlafit.datasets.downloads import as_text
from vlafit.datasets.stamps import Stamp
from vlafit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SIZE_SWITCH = "VLAFIT_CACHE_SIZE"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SLOTS = 64  # files with locks, each for the files whose names hash to it
LOCKS = ".locks"  # the folder of the locks, which stay: a deleted one is no lock
ROOM = "room"  # the lock of whoever counts and deletes
DELETED = ".deleted"  # its time is that of the last deletion
KEPT = "meta"  # folders of this name are never deleted
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<size>\d+)\.partial")


class BoundedCache:
    """Files below `folder`, of at most `limit` bytes together, those that are being copied included."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def get(self, path: Path, wanted: Stamp, copy: Callable[[Path], None]) -> bool:
        """Have a file with a size and time at `path`; return whether it had to be copied.

        `copy` writes it to the path that it is given. Where other copies that are being made leave no room,
        their end is waited for. Raises DataError if there is no room without them.
        """
        if self._touch(path, wanted):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.turn(self._lock_file(_slot(path))):
            if self._touch(path, wanted):  # another process has just copied it
                return False
            partial = path.with_name(f".{path.name}.{wanted[0]}.partial")
            self._reserve(path, partial, wanted[0])
            try:
                copy(partial)
                os.utime(partial, ns=(time.time_ns(), wanted[1]))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def deleted_since(self, then: int) -> int:
        """Return when a file was last deleted, in ns, if that was after `then`, else `then`."""
        try:
            return max(then, (self.folder / DELETED).stat().st_mtime_ns)
        except OSError:
            return then

    def used(self) -> int:
        """Return the bytes of all files."""
        return self._counted()[1]

    def _touch(self, path: Path, wanted: Stamp) -> bool:
        """Whether the file is there, which is then the most recently used."""
        try:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != wanted:
                return False
            os.utime(path, ns=(time.time_ns(), wanted[1]))
        except FileNotFoundError:
            return False
        return True

    def _reserve(self, path: Path, partial: Path, size: int) -> None:
        """Make room for the copy `partial`, which counts from then on, and create it."""
        began, said = time.monotonic(), False
        while True:
            with locks.turn(self._lock_file(ROOM)):
                if self._make_room(path, size):
                    return partial.touch()
            if not said and time.monotonic() - began > locks.LONG_WAIT_S:
                said = True
                log.warning(
                    "%s: %s waits for room that copies of other processes take; %s larger than %s makes more",
                    self.folder, path.name, SIZE_SWITCH, as_text(self.limit),
                )  # fmt: skip
            time.sleep(locks.LOOK_S)

    def _make_room(self, path: Path, size: int) -> bool:
        """Delete files until one of `size` bytes has room, which counts unless it is never deleted.

        Returns False where only copies that are being made leave none. Raises DataError if there is none
        without them.
        """
        limit = float("inf") if KEPT in path.parts else self.limit
        files, total = self._counted(_slot(path))
        arriving = total - sum(freed for _, freed, _ in files)
        for _, freed, oldest in files:
            if total + size <= limit and size <= shutil.disk_usage(self.folder).free:
                break
            oldest.unlink(missing_ok=True)
            total -= freed
            (self.folder / DELETED).touch()
        free = shutil.disk_usage(self.folder).free
        if size <= min(limit - total, free):
            return True
        if not arriving or size > limit:
            raise DataError(
                f"{path.name}: has {as_text(size)}, and the cache at {self.folder} may hold "
                f"{as_text(self.limit)} ({as_text(total)} are in use, the disk has {as_text(free)} free); "
                f"set {SIZE_SWITCH} to more, or free space"
            )
        return False

    def _counted(self, held: str = "") -> tuple[list[tuple[int, int, Path]], int]:
        """Return the files that may be deleted, the oldest first, and the bytes of these and of all copies.

        A copy may end meanwhile: as copies are listed first, it is then in one of the lists, or in both. See
        `_arriving` for `held`.
        """
        copies = self._arriving(held)
        files = sorted(self._files())
        there = {path for _, _, path in files}
        arriving = sum(
            size for partial, (path, size) in copies.items() if partial.exists() or path not in there
        )
        return files, sum(size for _, size, _ in files) + arriving

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (time of last use, size, path) of every file that may be deleted."""
        for path in self._paths():
            if path.name.startswith(".") or KEPT in path.relative_to(self.folder).parts[:-1]:
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield stat.st_atime_ns, stat.st_size, path

    def _paths(self) -> Iterator[Path]:
        """Yield every file below the folder, except for those in it and the locks."""
        for folder, folders, names in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders[:] = [name for name in folders if name != LOCKS]
            else:
                yield from (Path(folder, name) for name in names)

    def _arriving(self, held: str = "") -> dict[Path, tuple[Path, int]]:
        """Return the copies that are being made: what each becomes, and its size at the end.

        What a killed process left of one is deleted.

        `held` is the slot whose lock the caller holds before it copies: nobody else can be copying there.
        """
        copies: dict[Path, tuple[Path, int]] = {}
        for partial in self._paths():
            match = PARTIAL.fullmatch(partial.name)
            if match is None:
                continue
            path = partial.with_name(match["name"])
            slot = _slot(path)
            if slot == held:
                partial.unlink(missing_ok=True)
                continue
            with locks.if_free(self._lock_file(slot)) as free:
                if free:
                    partial.unlink(missing_ok=True)
                else:
                    copies[partial] = path, int(match["size"])
        return copies

    def _lock_file(self, name: str) -> Path:
        folder = self.folder / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def chosen_limit(folder: Path, used: int) -> int:
    """Return the bytes that the cache in `folder` may hold, of which it holds `used`.

    That is VLAFIT_CACHE_SIZE, or half of what the disk has free without the cache. Raises ConfigError for a
    value that is no size.
    """
    text = os.environ.get(SIZE_SWITCH, "")
    if not text:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        return (shutil.disk_usage(existing).free + used) // 2
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:B|)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"{SIZE_SWITCH} is {text!r}; write a size above 0, such as 50GB or 800MB")
    return int(float(match[1]) * UNITS[f"{match[2].upper()}B" if match[2] else ""])


def _slot(path: Path) -> str:
    return str(int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4]) % SLOTS)
