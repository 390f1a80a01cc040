"""Atomic writes of files and folders, and appended lines that survive a crash.

A file that cannot be written is a VlafitError saying where and why.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlafit.errors import StorageError, VlafitError

LOCK = ".lock"  # holds the id of the process that works in a folder; a killed process leaves the file behind
OWNER = ".lock.owner"  # the same, on file systems without flock: whoever creates it holds the lock
STRAY = re.compile(r"\.probe\.\d+|\..+\.(partial|old|removed)")  # what a killed process leaves behind
WRITER = r"(\d+)(?:-[0-9a-f]+)?"  # in the name of a file in work: the process, and one of its threads


def _cannot(what: str, path: Path, error: OSError) -> StorageError:
    blocking = next((p for p in path.parents if is_reachable_file(p)), None)
    reason = f"{blocking} is a file, not a folder" if blocking else error.strerror or str(error)
    for link in (path, *path.parents):
        if os.path.islink(link) and not os.path.lexists(os.path.realpath(link)):
            reason = f"{link} is a link to {os.readlink(link)}, which is not there"
    return StorageError(
        f"cannot {what} {path}: {reason}; choose another path, or fix its permissions or free space"
    )


def _make_folder(folder: Path, new: bool = False) -> None:
    """Create a folder and its parents. Raises OSError, for a name with a NUL character, too."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"a path cannot hold this character ({error})") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file atomically: readers, and a restart after a crash, see the old content or the new.

    Missing parent folders are created. Text is written as UTF-8.
    """
    with new_file(path) as partial:
        partial.write_bytes(_bytes(data) if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; that file takes its place on success, and is removed otherwise.

    Missing parent folders are created.
    """
    path = Path(path)
    # Not the process id alone, which containers that share a folder often have in common.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        _make_folder(path.parent)
        try:
            with open(partial, "xb") as file:
                mode = os.fstat(file.fileno()).st_mode
            yield partial
            _permit(partial, mode)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot("write", path, error) from error


def _permit(path: Path, mode: int) -> None:
    """Let everybody read and write a file whom `mode` lets: safetensors writes for the user alone."""
    before = os.stat(path).st_mode
    if missing := mode & READ_AND_WRITE & ~before:
        with suppress(PermissionError):  # a link to a file of another user
            os.chmod(path, stat.S_IMODE(before) | missing)


def _bytes(text: str) -> bytes:
    """Return text as UTF-8. Paths that this locale cannot decode are written as the bytes that they are."""
    return text.encode("utf-8", "surrogateescape")


def append_line(path: Path, text: str) -> None:
    """Append one line and fsync. A last line that a crash cut off is removed first."""
    if "\n" in text:
        raise ValueError("a line must not contain a line break")
    try:
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(_bytes(text) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot("write", Path(path), error) from error


LARGEST_TEXT = 2**30
READ_AND_WRITE = 0o666


class NotRegularError(OSError):
    """A folder, pipe, socket or device where a file is read; reading might never end."""

    def __str__(self) -> str:
        """Return the fault without number and path, for sentences that name the file."""
        return str(self.strerror)


KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand_user(path: str | Path) -> Path:
    """Return the path with ``~`` as the user's folder; as it is where ``~NAME`` is no user but a file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def irregular(path: Path) -> str:
    """Return what lies at `path` instead of a regular file, such as "a pipe"; "" for a file or nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else ""
    return next((name for is_kind, name in KINDS if is_kind(mode)), "")


def require_regular(path: Path) -> None:
    """Raise NotRegularError if something else than a regular file is there."""
    if kind := irregular(path):
        raise NotRegularError(errno.EINVAL, f"not a regular file but {kind}", str(path))


def require_regular_files(folder: Path, suffixes: Collection[str], deep: int = 0) -> None:
    """Raise StorageError for an entry of `folder` with one of the suffixes that is no regular file.

    A reader that asks whether a file is there would take it for absent. `deep` levels of folders below count.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in suffixes and (kind := irregular(path)):
            raise StorageError(
                f"{path}: not a regular file but {kind}; copy or download the file again, or remove it"
            )
        if deep and path.is_dir():
            require_regular_files(path, suffixes, deep - 1)


def plain_bytes(path: Path) -> bytes:
    """Return what a regular file holds. Raises OSError for a pipe, say, or for a file of more than 1 GiB."""
    require_regular(path)
    if os.stat(path).st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, "larger than 1 GiB, which no file of this kind is", str(path))
    return Path(path).read_bytes()


def plain_text(path: Path) -> str:
    """Return the text of a regular UTF-8 file, without a byte order mark, which editors of Windows write.

    Raises OSError as `plain_bytes` does.
    """
    return plain_bytes(path).decode("utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of unknown origin. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object of unknown origin. Raises ValueError if it is invalid or another value."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no JSON object but {type(value).__name__}")
    return value


def sha256_of_json(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_text(path: Path, error_class: type[VlafitError], fix: str) -> str:
    """Read a UTF-8 text file.

    Raises `error_class` if the file is missing or not UTF-8, and StorageError if it may not be read; `fix`
    ends the message.
    """
    require_readable(path)
    try:
        return plain_text(path)
    except UnicodeDecodeError as error:
        raise error_class(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); {fix}") from error
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error}); {fix}") from error


def read_json_object(path: Path, error_class: type[VlafitError], fix: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises `error_class` if the file is missing, damaged or another value, and StorageError if it may not be
    read; `fix` ends the message.
    """
    require_readable(path)
    try:
        value = parse_json(plain_text(path))
    except (OSError, ValueError) as error:
        raise error_class(f"{path}: cannot be read as JSON ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise error_class(f"{path}: not a JSON object but {type(value).__name__}; {fix}")
    return value


def read_json_lines(path: Path) -> list[dict]:
    """Read a file of one JSON object per line, without a last line that a crash cut off.

    A missing file gives an empty list. Raises VlafitError naming the line for anything that is not an object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines[:-1], start=1):  # text after the last line break is incomplete
        try:
            value = parse_json(line)
        except ValueError as error:
            raise VlafitError(
                f"{path}, line {number}: not JSON ({error}); remove the line to continue"
            ) from error
        if not isinstance(value, dict):
            raise VlafitError(f"{path}, line {number}: not a JSON object; remove the line to continue")
        objects.append(value)
    return objects


def is_reachable_file(path: Path) -> bool:
    """Return whether a file is there; False, too, where this user may not enter its folder."""
    try:
        return path.is_file()
    except OSError:
        return False


def require_readable(path: Path) -> None:
    """Raise StorageError if something is there that cannot be read, or is no regular file."""
    try:
        require_regular(path)
        path.open("rb").close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot("read", path, error) from error


def replace_folder(tmp: Path, final: Path, new: bool = False) -> None:
    """Replace the folder `final`, if it exists, by `tmp`. Both must be on one file system.

    With `new`, anything at `final` but an empty folder is an OSError instead.
    """
    old = final.with_name(f".{final.name}.old")
    try:
        for path in [*tmp.rglob("*"), tmp]:  # folders, too: their entries are what a crash loses
            if path.is_dir():
                _sync_folder(path)
            elif path.is_file():
                _permit(path, tmp.stat().st_mode)  # of a folder that was made just now
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if not new:
            shutil.rmtree(old, ignore_errors=True)
        if final.exists() and not new:
            os.rename(final, old)
        os.rename(tmp, final)
        _sync_folder(final.parent)
        if not new:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _cannot("write", final, error) from error


@contextmanager
def new_folder(final: Path, new: bool = False) -> Iterator[Path]:
    """Yield an empty folder that replaces `final` on success and is removed on any error.

    With `new`, nothing but an empty folder is replaced. Only one process at a time may create `final`: see
    `locks.creating`. A killed process leaves at most `.NAME.partial`, which the next attempt removes.
    """
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _make_folder(partial, new=True)
    except OSError as error:
        raise _cannot("create", final, error) from error
    try:
        yield partial
        replace_folder(partial, final, new)
    except VlafitError:
        raise
    except OSError as error:
        raise _cannot("write into", final, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by name, to avoid importing safetensors here
            raise
        raise StorageError(f"cannot write into {final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    try:
        require_regular(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VlafitError(f"cannot read {path}: {error.strerror or error}") from error


def require_writable(folder: Path) -> Path:
    """Create `folder` if it is missing, check that files can be written there, and return it."""
    folder = Path(folder)
    try:
        _make_folder(folder)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:  # has no name that a kill could leave
            probe.write(b"x")
    except OSError as error:
        raise _cannot("write to folder", folder, error) from error
    return folder


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds no file, except for what a killed process left behind (see `tidy`)."""
    return all(
        is_stray(path) or (path.is_dir() and not path.is_symlink() and is_empty(path))
        for path in folder.iterdir()
    )


def is_stray(path: Path) -> bool:
    """Return whether a path has a name that only a killed process leaves behind."""
    return path.name in (LOCK, OWNER) or STRAY.fullmatch(path.name) is not None


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of writing `path`. No other process may be writing it."""
    stray = re.compile(rf"\.{re.escape(path.name)}(\.{WRITER})?\.partial")
    for other in list(path.parent.iterdir()):
        if not stray.fullmatch(other.name):
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
        else:
            other.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove half-written files and folders of killed processes from `folder`, but not from its subfolders.

    A folder whose replacement was interrupted comes back. No other process may be writing there.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if not STRAY.fullmatch(path.name):
            continue
        final = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if path.name.endswith(".old") and path.is_dir() and not final.exists():
            os.rename(path, final)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
