"""Choose, check, announce and try again to copy the files of a dataset that is not on this machine."""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from vlafit.errors import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
Wait = Callable[[float], None]

WAITS_S = (1.0, 4.0, 16.0)  # before a file is tried again


class FinalError(DataError):
    """A file that another attempt would not copy."""


class UnreachableError(DataError):
    """Storage that did not answer in any attempt, or cannot be asked which files it has."""


class ChangedError(FinalError):
    """A file that was written again after it was listed."""


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


def attempts(path: str, read: Callable[[], T], fix: str, wait: Wait = time.sleep) -> T:
    """Return what `read` does, which is called again after a dropped connection or a server's failure.

    Every read of remote storage comes through here, so that all fail alike. Raises DataError naming the file
    at `path`; after the last attempt UnreachableError, with the reason and the `fix`.
    """
    for pause in (*WAITS_S, None):
        try:
            return read()
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from error
        except (FinalError, UnreachableError):  # the latter has had its attempts
            raise
        except Exception as error:  # the clients' own: a dropped connection, a time-out, a server's 503
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"{path}: the disk is full ({error}); free space") from error
            if pause is None:
                raise UnreachableError(
                    f"{path}: could not be read in {len(WAITS_S) + 1} attempts: {reason(error)}. {fix}"
                ) from error
            wait(pause)
    raise AssertionError("the last attempt returns or raises")


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


def announce_in_place(
    url: str, files: int, size: int, limit: int, switch: str, used: int, folder: Path
) -> None:
    """Log that files are read at their URL, and how many bytes of copies are kept."""
    log.info(
        "%s: is read in place, %s files of %s; at most %s are kept at %s (%s), %s are now",
        url, f"{files:,}", as_text(size), as_text(limit), folder, switch, as_text(used),
    )  # fmt: skip


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
