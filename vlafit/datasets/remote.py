"""Datasets at a URL: ``s3://``, ``gs://`` and ``az://`` by fsspec, ``hf://`` by huggingface_hub.

All files that are read are copied to this machine first, so that training depends on no connection, and no
dataset is opened that lacks a file. Sizes are logged before a copy starts.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlafit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

STORAGE = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # scheme -> package
HUB = "hf"
URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<rest>.+)", re.DOTALL)
HUB_PATH = re.compile(r"datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<below>.+))?")
WILD = re.compile(r"[*?\[]")


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


METADATA = Needed("meta/", lambda _, names: {n for n in names if n.startswith("meta/")}, optional=True)
"""All that a card is drafted from: LeRobot's metadata, or every file of another layout."""


def is_url(text: str) -> bool:
    """Whether `text` is written like a URL, of any scheme."""
    return URL.fullmatch(text) is not None


def fetch(url: str, needed: Needed | None = None) -> Path:
    """Return a local folder (or file) with the files at `url`: all, or those that are `needed`.

    A copy whose files are still what the storage holds is used again. Raises DataError if the storage has no
    such files or cannot be reached, ConfigError for a scheme that is not read.
    """
    match = URL.fullmatch(url)
    assert match is not None
    scheme, rest = match["scheme"].lower(), match["rest"].rstrip("/")
    if scheme == HUB:
        from vlafit.datasets import hub

        place = HUB_PATH.fullmatch(rest)
        if place is None:
            raise ConfigError(
                f"{url}: write a dataset of the Hub as hf://datasets/ORG/NAME[@REVISION][/FOLDER]"
            )
        revision = (place["revision"] or "").replace("%2F", "/")
        return hub.fetch(place["repo"], revision, place["below"] or "", needed)
    if scheme in STORAGE:
        from vlafit.datasets import storage

        return storage.fetch(storage.connect(scheme, STORAGE[scheme], url), f"{scheme}://{rest}", needed)
    ways = {
        "http": f"wget --recursive --no-parent {url}",
        "https": f"wget --recursive --no-parent {url}",
        "file": f"its path, {rest}",
    }
    known = ", ".join(f"{name}://" for name in (*STORAGE, HUB))
    raise ConfigError(
        f"{url}: a dataset cannot be read from {scheme}://, only from {known}. Copy it to a folder "
        f"({ways.get(scheme, 'rclone copy, for example')}) and name the folder"
    )


def split_pattern(url: str) -> tuple[str, str]:
    """Return a URL's folders before the first wildcard, and the rest ("" if it has none)."""
    match = URL.fullmatch(url)
    assert match is not None
    parts = match["rest"].split("/")
    fixed = next((n for n, part in enumerate(parts) if WILD.search(part)), len(parts))
    return f"{match['scheme']}://{'/'.join(parts[:fixed])}", "/".join(parts[fixed:])


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
