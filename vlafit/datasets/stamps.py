"""Notice files that change while a dataset is open, by their size and time."""

from collections.abc import Mapping
from pathlib import Path

from vlafit.errors import DataError

Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """Return size in bytes and time of the last change in ns. Raises DataError if it cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


class Stamps:
    """The stamps that files had when they were first read."""

    def __init__(self, first: Mapping[Path, Stamp] | None = None) -> None:
        self._first: dict[Path, Stamp] = dict(first or {})

    def require_unchanged(self, path: Path) -> None:
        """Raise DataError if a file was overwritten or cut since it was first asked about.

        Ask before every read: what is read of a memory map beyond the end of its file ends the process.
        """
        now = stamp(path)
        then = self._first.setdefault(path, now)
        if now != then:
            size = f" ({then[0]:,} bytes, now {now[0]:,})" if now[0] != then[0] else ""
            raise DataError(
                f"{path}: changed since the dataset was opened{size}; restore it, and --resume the run"
            )
