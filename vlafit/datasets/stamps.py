"""Notice files that change while a dataset is open, by their size and time."""

import os
from collections.abc import Mapping
from pathlib import Path

from vlafit.errors import DataError

Stamp = tuple[int, int]


def stamp(path: Path | str) -> Stamp:
    """Return size in bytes and time of the last change in ns. Raises DataError if it cannot be read."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def changed(name: str, then: Stamp, now: Stamp) -> DataError:
    """Return the error of a file that was overwritten or cut."""
    size = f" ({then[0]:,} bytes, now {now[0]:,})" if now[0] != then[0] else ""
    return DataError(f"{name}: changed since the dataset was opened{size}; restore it, and --resume the run")


class Stamps:
    """The stamps that files had when they were first read."""

    def __init__(self, first: Mapping[Path, Stamp] | Mapping[str, Stamp] | None = None) -> None:
        self._first: dict[str, Stamp] = {str(path): known for path, known in (first or {}).items()}

    def require_unchanged(self, path: Path | str) -> None:
        """Raise DataError if a file was overwritten or cut since it was first asked about.

        Ask before every read: what is read of a memory map beyond the end of its file ends the process.
        """
        name = path if isinstance(path, str) else str(path)  # hashing and comparing a Path takes longer
        now = stamp(name)
        then = self._first.setdefault(name, now)
        if now != then:
            raise changed(name, then, now)

    def known(self, name: str) -> Stamp | None:
        """Return the stamp that a file had first, if it was asked about."""
        return self._first.get(name)
