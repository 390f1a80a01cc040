"""Datasets at a URL: ``s3://``, ``gs://`` and ``az://`` by fsspec, ``hf://`` by huggingface_hub.

All files that are read are copied to this machine first, so that training depends on no connection, and no
dataset is opened that lacks a file. Sizes are logged before a copy starts.
"""

import re
from pathlib import Path

from vlafit.datasets import hub, storage
from vlafit.datasets.downloads import Needed
from vlafit.errors import ConfigError

STORAGE = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # scheme -> package
HUB = "hf"
URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<rest>.+)", re.DOTALL)
HUB_PATH = re.compile(r"datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<below>.+))?")
WILD = re.compile(r"[*?\[]")


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
        place = HUB_PATH.fullmatch(rest)
        if place is None:
            raise ConfigError(
                f"{url}: write a dataset of the Hub as hf://datasets/ORG/NAME[@REVISION][/FOLDER]"
            )
        revision = (place["revision"] or "").replace("%2F", "/")
        return hub.fetch(place["repo"], revision, place["below"] or "", needed)
    if scheme in STORAGE:
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
