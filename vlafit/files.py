"""Writing that an interruption cannot spoil: whole files, folders and lines, by one process at a time.

Whatever cannot be written is a VlafitError that says where and why.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlafit.errors import StorageError, VlafitError

log = logging.getLogger(__name__)

LOCK = ".lock"  # in a folder that is worked in; it holds the process's number. One that is killed leaves it.


def _cannot(what: str, path: Path, error: OSError) -> StorageError:
    blocking = next((p for p in path.parents if p.is_file()), None)
    reason = f"{blocking} is a file, not a folder" if blocking else error.strerror or str(error)
    return StorageError(
        f"cannot {what} {path}: {reason}; choose another place, or mend its rights or free space"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file, so that readers and crashes see the old content or the new, never a part.

    Missing parent folders are made. Text is written as UTF-8.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot("write", path, error) from error


def append_line(path: Path, text: str) -> None:
    """Append one line and force it to the disk. A last line that a crash cut off is dropped first."""
    if "\n" in text:
        raise ValueError("a line holds no line break")
    try:
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot("write", Path(path), error) from error


def read_json_lines(path: Path) -> list[dict]:
    """Read a file of one JSON object a line. A last line that a crash cut off is left out.

    Raises VlafitError naming the line for anything else that is not an object; a missing file is empty.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was never finished
        try:
            value = json.loads(line)
        except ValueError as error:
            raise VlafitError(
                f"{path}, line {number}: not JSON ({error}); remove the line to go on"
            ) from error
        if not isinstance(value, dict):
            raise VlafitError(f"{path}, line {number}: not a JSON object; remove the line to go on")
        found.append(value)
    return found


def replace_folder(tmp: Path, final: Path) -> None:
    """Rename `tmp` to `final`, which may exist and is then removed. Both lie on one file system."""
    old = final.with_name(f".{final.name}.old")
    try:
        for path in tmp.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.rename(final, old)
        os.rename(tmp, final)
        _sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _cannot("write", final, error) from error


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final` that takes its place on success and vanishes on any error.

    A killed process leaves at most `.NAME.partial`, which the next attempt removes.
    """
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _cannot("make", final, error) from error
    try:
        yield partial
        replace_folder(partial, final)
    except VlafitError:
        raise
    except OSError as error:
        raise _cannot("write into", final, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # not imported for its name alone
            raise
        raise StorageError(f"cannot write into {final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VlafitError(f"cannot read {path}: {error.strerror or error}") from error


def require_writable(folder: Path) -> Path:
    """Make `folder` if need be, prove that files can be written there, and return it."""
    folder = Path(folder)
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise _cannot("write to folder", folder, error) from error
    return folder


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing, or only the lock that a killed process left."""
    return all(path.name == LOCK for path in folder.iterdir())


def require_unlocked(folder: Path, what: str) -> None:
    """Raise VlafitError where another process holds the folder's lock. Writes nothing."""
    if (folder / LOCK).is_file():
        with _held(folder, what):
            pass


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[int]:
    """Hold the folder's lock, and yield its file descriptor; processes that inherit it hold it, too.

    The system lets go of it when the last of them ends, however it ends. Raises VlafitError, naming the
    folder and the process, where another command holds it; `what` says which kind of command that is.
    """
    require_writable(folder)
    with _held(folder, what) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        try:
            yield file.fileno()
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # still held: who opened it meanwhile looks again


@contextmanager
def _held(folder: Path, what: str) -> Iterator[BinaryIO]:
    path = folder / LOCK
    while True:
        with open(path, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                number = file.read().strip().decode(errors="replace")
                who = f"another {what} (process {number})" if number.isdigit() else f"another {what}"
                raise VlafitError(
                    f"{folder}: {who}, or a run that it began, is at work here; wait for it, or stop it"
                ) from error
            except OSError as error:  # of a file system that knows no locks
                log.warning("cannot lock %s (%s): let no other command work there meanwhile", folder, error)
            if _is_at(file, path):  # else its holder has just removed it
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
