"""Copy a dataset from object storage, by fsspec, into a folder named after its content.

The folder ``<hash>/NAME`` appears once every file is there with the size (and checksum, where the storage
tells one) of the listing, and the listing has not changed meanwhile. The hash is that of names, sizes and
versions: storage that changes gets a new folder, into which unchanged files are linked. A copy that was
stopped goes on with the next command.
"""

import base64
import binascii
import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit import locks
from vlafit.datasets.downloads import (
    Needed,
    UnreachableError,
    announce,
    attempts,
    progress,
    require_inside,
)
from vlafit.datasets.hdf5_index import SWITCH, folder
from vlafit.errors import ConfigError, DataError
from vlafit.files import parse_json, plain_text, replace_folder, write_atomic

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FILES = "files.json"  # beside the dataset's folder: which files are there, and where they are from
AT_ONCE = 8  # files
PROGRESS_S = 15.0
VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "created", "mtime")


@dataclass(frozen=True)
class RemoteFile:
    """One file, as its storage lists it."""

    path: str
    """Where the file system finds it."""
    size: int
    version: str
    """Differs once the file was written again."""
    md5: str
    """Checksum of the content in hex, empty if the storage does not tell it."""


def connect(scheme: str, package: str, url: str) -> "AbstractFileSystem":
    """Return the file system of a URL, with the credentials that its package finds in the environment."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        extra = {"s3fs": "'vlafit[s3]'", "gcsfs": "'vlafit[gs]'"}.get(package, package)
        raise ConfigError(
            f"{url}: {scheme}:// needs the package {package} ({error}); run: pip install {extra}, or copy "
            "the files to a folder and name it"
        ) from error
    import fsspec

    return fsspec.filesystem(scheme, skip_instance_cache=True)  # one made before a fork would not answer


def fetch(
    system: "AbstractFileSystem",
    url: str,
    needed: Needed | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Return the folder (or file) that holds a copy of the files at `url`: all, or those `needed`.

    Raises DataError if there is none, or one cannot be copied.
    """
    cache = folder()
    if cache is None:
        raise ConfigError(
            f"{url}: is copied before it is read, but {SWITCH} is off; set {SWITCH} to a folder"
        )
    cache = cache.with_name("remote")
    listed, is_file = list_files(system, url, wait)
    wanted = listed
    if needed is not None:

        def copy(names: Collection[str]) -> Path:
            return _copy(system, url, {name: listed[name] for name in names}, cache, wait)

        wanted = {name: listed[name] for name in sorted(needed.names(listed.keys(), copy, url))}
    whole = _copy(system, url, wanted, cache, wait)
    return whole / next(iter(wanted)) if is_file else whole


def _copy(
    system: "AbstractFileSystem",
    url: str,
    wanted: Mapping[str, RemoteFile],
    cache: Path,
    wait: Callable[[float], None],
) -> Path:
    """Return the complete folder of the files `wanted`, copied if it is not there."""
    facts = {"url": url, "files": {name: [f.size, f.version] for name, f in sorted(wanted.items())}}
    text = json.dumps(facts, sort_keys=True)
    final = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    name = _name(url)
    with locks.waiting(final, f"copying {url}"):
        if final.is_dir():
            _require_whole(final / name, wanted)
            return final / name
        partial = final.with_name(f".{final.name}.partial")
        earlier = _earlier(cache, url, name)
        missing = {
            n: file
            for n, file in wanted.items()
            if not _is_whole(partial / name / n, file)
            and not _link(earlier.get((n, file.size, file.version)), partial / name / n)
        }
        size = sum(file.size for file in wanted.values())
        announce(url, len(wanted), size, len(missing), sum(f.size for f in missing.values()), final)
        _copy_all(system, url, missing, partial / name, wait)
        after, _ = list_files(system, url, wait)
        changed = sorted(n for n, file in wanted.items() if after.get(n) != file)
        if changed:
            shutil.rmtree(partial)
            raise DataError(
                f"{url}: changed while it was copied ({', '.join(changed[:5])}); run the command again once "
                "nothing is written there"
            )
        write_atomic(partial / FILES, text)
        replace_folder(partial, final)
    return final / name


def list_files(
    system: "AbstractFileSystem", url: str, wait: Callable[[float], None] = time.sleep
) -> tuple[dict[str, RemoteFile], bool]:
    """Return all files below `url` by their names from there on, and whether it is a file itself."""
    root = str(system._strip_protocol(url)).rstrip("/")

    def find() -> Mapping[str, Mapping[str, Any]]:
        system.invalidate_cache()
        return system.find(root, detail=True)  # type: ignore[return-value]

    fix = (
        "Check the address and the credentials in the environment; or copy the files to a folder, and name it"
    )
    try:
        entries = attempts(url, find, fix, wait)
    except DataError as error:
        raise UnreachableError(f"{error}{_kept(url)}") from error
    files: dict[str, RemoteFile] = {}
    is_file = list(entries) == [root]
    for path, info in entries.items():
        if info.get("type") != "file" or path.endswith("/"):
            continue
        if not is_file and not path.startswith(f"{root}/"):
            raise DataError(f"{url}: the storage lists {path!r}, which is not below it")
        name = path.rsplit("/", 1)[-1] if is_file else path[len(root) + 1 :]
        require_inside(name, url)
        size = info.get("size")
        version = version_of(info)
        if not isinstance(size, int) or not version:
            raise DataError(
                f"{url}: the storage does not tell size and version of {name}; copy the files to a "
                "folder and name it"
            )
        files[name] = RemoteFile(path, size, version, _md5(info))
    if not files:
        raise DataError(f"{url}: nothing is there; check the address")
    return files, is_file


def version_of(info: Mapping[str, Any]) -> str:
    """Return what differs once a file is written again, of its storage's entry; empty if nothing does."""
    value = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    return str(value.timestamp() if isinstance(value, datetime) else value)


def _copy_all(
    system: "AbstractFileSystem",
    url: str,
    files: Mapping[str, RemoteFile],
    target: Path,
    wait: Callable[[float], None],
) -> None:
    total, done, told = sum(file.size for file in files.values()), 0, time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            jobs = {
                pool.submit(_copy_one, system, target / name, file, wait): file
                for name, file in files.items()
            }
            for job in as_completed(jobs):
                job.result()
                done += jobs[job].size
                if time.monotonic() - told > PROGRESS_S:
                    told = time.monotonic()
                    progress(url, done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_one(
    system: "AbstractFileSystem", target: Path, file: RemoteFile, wait: Callable[[float], None]
) -> None:
    """Copy one file, again after a dropped connection. Raises DataError naming it."""
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)

    def copy() -> None:
        try:
            system.get_file(file.path, str(partial))
            require_content(partial, file)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    attempts(file.path, copy, "Run the command again: files that are complete are not copied again", wait)


def require_content(path: Path, file: RemoteFile) -> None:
    """Raise DataError unless the copy at `path` has size and checksum of `file`."""
    with open(path, "rb") as copy:
        os.fsync(copy.fileno())
    size = path.stat().st_size
    if size != file.size:
        raise DataError(f"{file.path}: {size:,} bytes arrived, the storage lists {file.size:,}")
    if file.md5:
        with open(path, "rb") as copy:
            if hashlib.file_digest(copy, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != file.md5:
                raise DataError(f"{file.path}: other bytes arrived than the storage's checksum is of")


def _earlier(cache: Path, url: str, name: str) -> dict[tuple[str, int, str], Path]:
    """Return the files of earlier copies of a URL, by name, size and version."""
    known: dict[tuple[str, int, str], Path] = {}
    for path in cache.glob(f"*/{FILES}"):
        facts = _facts(path)
        if facts.get("url") == url:
            known |= {(n, s, v): path.parent / name / n for n, (s, v) in facts["files"].items()}
    return known


def _link(kept: Path | None, target: Path) -> bool:
    """Link `target` to a file of an earlier copy; return whether that was possible."""
    if kept is None or not kept.is_file():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(kept, target)
    except OSError:  # a file system without links
        return False
    return True


def _require_whole(root: Path, files: Mapping[str, RemoteFile]) -> None:
    bad = [name for name, file in files.items() if not _is_whole(root / name, file)]
    if bad:
        raise DataError(
            f"{root}: {len(bad)} files of the copy are missing or of another size than the storage's, for "
            f"example {bad[0]}; delete {root.parent} and run the command again"
        )


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _facts(path: Path) -> Mapping[str, Any]:
    try:
        facts = parse_json(plain_text(path))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _kept(url: str) -> str:
    """Return a sentence that names an earlier, complete copy; empty if there is none."""
    cache = folder()
    copies: Collection[Path] = () if cache is None else sorted(cache.with_name("remote").glob(f"*/{FILES}"))
    for path in copies:
        if _facts(path).get("url") == url:
            return f". A copy made earlier is {path.parent / _name(url)}"
    return ""


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _md5(info: Mapping[str, Any]) -> str:
    value = info.get("md5Hash")  # of Google's storage; an S3 ETag is an MD5 only sometimes
    try:
        return base64.b64decode(value, validate=True).hex() if isinstance(value, str) else ""
    except (binascii.Error, ValueError):
        return ""
