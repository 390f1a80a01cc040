"""Datasets at a URL: ``s3://``, ``gs://`` and ``az://`` by fsspec, ``hf://`` of the Hub, ``https://``.

A LeRobot dataset is read in place: its files are copied when they are needed, into a cache of limited size.
Of another layout all files are copied first, so that no dataset is opened that lacks a file; their sizes are
logged before. A web server lists no files: it can only serve LeRobot's, whose names its metadata tells.
"""

import logging
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from vlafit.datasets import hub, storage, web
from vlafit.datasets.downloads import Needed, UnreachableError
from vlafit.datasets.hdf5_index import SWITCH, folder
from vlafit.datasets.listing import INFO, Listing, Storage, kept_listing
from vlafit.datasets.web_files import HttpFiles
from vlafit.errors import ConfigError, DataError, shown_url

if TYPE_CHECKING:
    from vlafit.datasets.lerobot.in_place import FilesInPlace

log = logging.getLogger(__name__)

STORAGE = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # scheme -> package
HUB, WEB = "hf", ("https", "http")
URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<rest>.+)", re.DOTALL)
HUB_PATH = re.compile(r"datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<below>.+))?")
HUB_PAGE = re.compile(
    r"(?:www\.)?(?:huggingface|hf)\.co/datasets/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob)/(?P<revision>[\w.-]+).*)?"
)
WILD = re.compile(r"[*?\[]")


def is_url(text: str) -> bool:
    """Whether `text` is written like a URL, of any scheme."""
    return URL.fullmatch(text) is not None


MOST_LOOKED_AT = 16
LISTING_HOLDS_S = 60.0  # from looking at a dataset until it is opened, usually by the same command
_looked_at: "list[_LookedAt]" = []


class _LookedAt(NamedTuple):
    """What was found at a URL."""

    when: float
    place: Path | None
    urls: tuple[str, ...]
    files: "FilesInPlace | None"


def look_at(url: str) -> "FilesInPlace | None":
    """Return files as `in_place` does, and keep them for its next call, so that storage is listed once."""
    files = in_place(url)
    urls = (url, files.url) if files else (url,)  # that of a commit, too
    others = [known for known in _looked_at if url not in known.urls][-MOST_LOOKED_AT:]
    _looked_at[:] = [*others, _LookedAt(time.monotonic(), folder(), urls, files)]
    return files


def in_place(url: str) -> "FilesInPlace | None":
    """Return the files of the LeRobot dataset at `url`, with its metadata here; None for another layout.

    Where the storage cannot be reached, the files are those that it had when it was opened last. Raises
    DataError if it has no such files, ConfigError for a scheme that is not read.
    """
    for known in list(_looked_at):
        if url in known.urls and known.place == folder():
            _looked_at.remove(known)
            if time.monotonic() - known.when < LISTING_HOLDS_S:
                return known.files
    scheme, rest = _split(url)
    place = folder()
    if place is None:
        raise ConfigError(
            f"{url}: files are copied before they are read, but {SWITCH} is off; set {SWITCH} to a folder"
        )
    place = place.with_name("in_place")
    try:
        listing = _listing(scheme, rest, url)
    except UnreachableError as error:
        kept = kept_listing(place, partial(_same, f"{scheme}://{rest}"))
        if kept is None:
            raise
        log.warning("%s; reading on from the copies at %s", error, place)
        listing = Listing(kept[0], kept[1], partial(_connect, scheme, url))
    if INFO not in listing.files:
        return None
    from vlafit.datasets.lerobot.in_place import FilesInPlace  # pyarrow, and with it a thread

    return FilesInPlace(listing, place)


def fetch(url: str, needed: Needed | None = None) -> Path:
    """Return a local folder (or file) with the files at `url`: all, or those that are `needed`.

    A copy whose files are still what the storage holds is used again. Raises DataError if the storage has no
    such files or cannot be reached, ConfigError for a scheme that is not read.
    """
    scheme, rest = _split(url)
    if scheme == HUB:
        repo, revision, below = _of_hub(rest, url)
        return hub.fetch(repo, revision, below, needed)
    if scheme in STORAGE:
        return storage.fetch(storage.connect(scheme, STORAGE[scheme], url), f"{scheme}://{rest}", needed)
    raise DataError(
        f"{url}: has no {INFO}, so it is no LeRobot dataset, and a web server lists no files of another. "
        f"Copy them to a folder (wget --recursive --no-parent {url}) and name the folder"
    )


def _split(url: str) -> tuple[str, str]:
    """Return scheme and the rest of a URL.

    Raises ConfigError for a scheme that is not read, and for a password or a query, without showing it.
    """
    match = URL.fullmatch(url)
    assert match is not None
    scheme, rest = match["scheme"].lower(), match["rest"].rstrip("/")
    page = HUB_PAGE.fullmatch(rest.partition("?")[0]) if scheme in WEB else None
    if page is not None:
        revision = page["revision"] if page["revision"] not in (None, "main") else ""
        raise ConfigError(
            f"{url.partition('?')[0]}: a page of the Hub; name the dataset by its id: "
            f"{page['repo']}{f'@{revision}' if revision else ''}"
        )
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if ":" in user or (scheme in WEB and (at or "?" in rest)):
        raise ConfigError(
            f"{shown_url(url)}: holds a password or a query, which every record of a run would show; leave "
            "it out (s3://, gs:// and az:// read credentials from the environment), or copy the files to a "
            "folder and name it"
        )
    if scheme not in (*STORAGE, HUB, *WEB):
        way = f"its path, {rest}" if scheme == "file" else "rclone copy, for example"
        known = ", ".join(f"{name}://" for name in (*STORAGE, HUB, *WEB))
        raise ConfigError(
            f"{url}: a dataset cannot be read from {scheme}://, only from {known}. Copy it to a folder "
            f"({way}) and name the folder"
        )
    return scheme, rest


def _of_hub(rest: str, url: str) -> tuple[str, str, str]:
    """Return repository, revision and folder of a URL of the Hub."""
    place = HUB_PATH.fullmatch(rest)
    if place is None:
        raise ConfigError(f"{url}: write a dataset of the Hub as hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    return place["repo"], (place["revision"] or "").replace("%2F", "/"), place["below"] or ""


def _listing(scheme: str, rest: str, url: str) -> Listing:
    if scheme == HUB:
        return hub.listing(*_of_hub(rest, url))
    connect: Callable[[], Storage] = partial(_connect, scheme, url)
    plain = f"{scheme}://{rest}"
    if scheme in WEB:
        return web.listing(plain)
    files, is_file = storage.list_files(storage.connect(scheme, STORAGE[scheme], url), plain)
    return Listing(plain, {} if is_file else files, connect)


def _connect(scheme: str, url: str) -> Storage:
    if scheme == HUB:
        return hub.connect()
    if scheme in WEB:
        return HttpFiles()
    return cast(Storage, storage.connect(scheme, STORAGE[scheme], url))


def _same(url: str, kept: str) -> bool:
    """Whether a kept listing is that of `url`, which may name no commit."""
    return kept == url or ("@" not in url and re.sub(r"@[^/]+", "", kept, count=1) == url)


def split_pattern(url: str) -> tuple[str, str]:
    """Return a URL's folders before the first wildcard, and the rest ("" if it has none)."""
    match = URL.fullmatch(url)
    assert match is not None
    parts = match["rest"].split("/")
    fixed = next((n for n, part in enumerate(parts) if WILD.search(part)), len(parts))
    return f"{match['scheme']}://{'/'.join(parts[:fixed])}", "/".join(parts[fixed:])
