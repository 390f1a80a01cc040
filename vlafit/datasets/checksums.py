"""Checksums of a dataset's files, written on request and compared when a run begins.

Nothing in a file tells that bytes of a frame changed. The list is in the dataset's folder, hidden from
layouts, and of the form that `sha256sum -c` reads.
"""

import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlafit import files
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import ConfigError, DataError, command_line

log = logging.getLogger(__name__)

NAME = ".vlafit.sha256"
LINE = re.compile("([0-9a-f]{64}) [ *](.+)")
AT_ONCE = 4  # files that are read at the same time
SHOWN = 5  # files in an error


def list_of(store: EpisodeStore) -> Path:
    """Return where the checksums of a dataset are: in its folder, or beside its only file."""
    location = store.card.location()
    return location / NAME if location.is_dir() else location.with_name(f".{location.name}{NAME}")


def write(store: EpisodeStore) -> Path:
    """Write the checksums of all files of a dataset. Raises ConfigError for a remote one."""
    if store.card.source:
        raise ConfigError(
            f"{store.card.source}: the storage keeps checksums of its own; copy the dataset to a folder, "
            "and name that"
        )
    path = list_of(store)
    files.write_atomic(path, "".join(f"{digest}  {name}\n" for name, digest in _digests(store, path).items()))
    return path


def require_same(stores: Sequence[EpisodeStore]) -> None:
    """Compare the files of each dataset that has checksums. Raises DataError naming those that differ."""
    for store in stores:
        path = None if store.card.source else list_of(store)
        if path is None or not files.is_reachable_file(path):
            continue
        began, written = time.monotonic(), _read(path)
        now = _digests(store, path)
        wrong = [f"{name}: its bytes changed" for name in now if written.get(name, now[name]) != now[name]]
        wrong += [f"{name}: is missing" for name in written if name not in now]
        wrong += [f"{name}: is new" for name in now if name not in written]
        if wrong:
            more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            listed = "".join(f"\n  {line}" for line in wrong[:SHOWN])
            again = command_line("data", "stats", store.card.file or store.card.location(), "--checksums")
            raise DataError(
                f"dataset {store.card.name!r}: files are not those of {path}:{listed}{more}\n"
                f"Fetch or copy them again; if the change is meant, write the checksums anew: {again}"
            )
        log.info("%d files are those of %s (%.1f s)", len(now), path, time.monotonic() - began)


def _digests(store: EpisodeStore, path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its name from the folder of `path` on."""
    names = {_name(file, path): file for file, _ in store.stamps()}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(files.sha256, names.values()), strict=True))


def _name(file: Path, path: Path) -> str:
    name = os.path.relpath(file, path.parent)
    if "\n" in name or "\\" in name:
        raise ConfigError(f"{file}: a list of checksums cannot hold this name; rename the file")
    return name


def _read(path: Path) -> dict[str, str]:
    written = {}
    text = files.read_text(path, DataError, "write it anew: vlafit data stats CARD --checksums")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path}, line {number}: is no checksum and name; write it anew: vlafit data stats CARD "
                "--checksums"
            )
        written[match[2]] = match[1]
    return written
