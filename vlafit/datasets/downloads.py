"""Choose, check and announce the files of a dataset that are copied from the Hub or from object storage."""

import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlafit.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needed:
    """Which files of a dataset are read, if not all of them."""

    first: str
    """Files whose names begin so are copied first, because they tell the others: "meta/"."""
    choose: Callable[[Path, Collection[str]], Collection[str]]
    """Returns the names of all files to read, of a folder that holds `first` and the names that exist.

    Raises DataError if one of them does not exist.
    """
    optional: bool = False
    """Whether all files are read if there is none in `first`; else that is an error."""

    def names(
        self, listed: Collection[str], copy: Callable[[Collection[str]], Path], where: str, below: str = ""
    ) -> Collection[str]:
        """Return which of the `listed` names are read; `copy` fetches some and returns their folder.

        Messages name `where` the files are, and the folder `below` that the names begin in. Raises DataError
        if a file that is needed does not exist.
        """
        first = [name for name in listed if name.startswith(self.first)]
        if first:
            return self.choose(copy(first), listed)
        if not self.optional:
            raise DataError(f"{where}: holds {len(listed):,} files, but none at {below}{self.first}")
        return listed


METADATA = Needed("meta/", lambda _, names: {n for n in names if n.startswith("meta/")}, optional=True)
"""All that a card is drafted from: LeRobot's metadata, or every file of another layout."""


def require_inside(name: str, url: str) -> None:
    """Raise DataError for the name of a remote file that would be written outside the dataset's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise DataError(f"{url}: holds a file called {name!r}, which leads out of the dataset's folder")


def announce(url: str, files: int, size: int, missing: int, missing_size: int, folder: Path) -> None:
    """Log what is about to be copied. Raises DataError if the disk has no room for it."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text = f"{url}: {files:,} files, {as_text(size)}"
    if missing_size > free:
        raise DataError(
            f"{text}, of which {as_text(missing_size)} are not here yet; {folder} has room for "
            f"{as_text(free)}. Free space, set VLAFIT_CACHE (for hf://: HF_HOME) to a folder of another "
            "disk, or write a card that needs fewer episodes or cameras"
        )
    if missing:
        log.info("%s; copying %d (%s) to %s", text, missing, as_text(missing_size), folder)


def progress(url: str, done: int, total: int) -> None:
    """Log how much has been copied."""
    log.info("%s: %s of %s", url, as_text(done), as_text(total))


def as_text(size: int) -> str:
    """Return a number of bytes as text: ``3.2 GB``."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} bytes"


def reason(error: BaseException) -> str:
    """Return kind and first line of a client's error."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
