"""Atomic writes of files and folders, appended lines that survive a crash, and folder locks.

A file that cannot be written is a VlafitError saying where and why.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vlafit.errors import StorageError, VlafitError

log = logging.getLogger(__name__)

LOCK = ".lock"  # holds the id of the process that works in a folder; a killed process leaves the file behind
OWNER = ".lock.owner"  # the same, on file systems without flock: whoever creates it holds the lock
STRAY = re.compile(r"\.probe\.\d+|\..+\.partial|\..+\.old")  # what a killed process leaves behind


def _cannot(what: str, path: Path, error: OSError) -> StorageError:
    blocking = next((p for p in path.parents if p.is_file()), None)
    reason = f"{blocking} is a file, not a folder" if blocking else error.strerror or str(error)
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _make_folder(path.parent)
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot("write", path, error) from error


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


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of unknown origin. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path, error_class: type[VlafitError], fix: str) -> str:
    """Read a UTF-8 text file.

    Raises `error_class` if the file is missing or not UTF-8, and StorageError if it may not be read; `fix`
    ends the message.
    """
    require_readable(path)
    try:
        return path.read_text(encoding="utf-8")
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
        value = parse_json(path.read_text(encoding="utf-8"))
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


def require_readable(path: Path) -> None:
    """Raise StorageError if a file is there and cannot be opened; it need not be damaged."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot("read", path, error) from error


def replace_folder(tmp: Path, final: Path) -> None:
    """Replace the folder `final`, if it exists, by `tmp`. Both must be on one file system."""
    old = final.with_name(f".{final.name}.old")
    try:
        for path in [*tmp.rglob("*"), tmp]:  # folders, too: their entries are what a crash loses
            if path.is_dir():
                _sync_folder(path)
            elif path.is_file():
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
    """Yield an empty folder that replaces `final` on success and is removed on any error.

    A killed process leaves at most `.NAME.partial`, which the next attempt removes.
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
        replace_folder(partial, final)
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
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VlafitError(f"cannot read {path}: {error.strerror or error}") from error


def require_writable(folder: Path) -> Path:
    """Create `folder` if it is missing, check that files can be written there, and return it."""
    folder = Path(folder)
    probe = folder / f".probe.{os.getpid()}"
    try:
        _make_folder(folder)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise _cannot("write to folder", folder, error) from error
    return folder


def is_empty(folder: Path) -> bool:
    """Return whether a folder is empty, except for what a killed process left behind (see `tidy`)."""
    return all(path.name in (LOCK, OWNER) or STRAY.fullmatch(path.name) for path in folder.iterdir())


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


def require_unlocked(folder: Path, what: str) -> None:
    """Raise VlafitError if another process holds the folder's lock. Writes nothing."""
    if (folder / LOCK).is_file():
        with _held(folder, what):
            pass


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[int]:
    """Hold the folder's lock and yield its file descriptor; child processes that inherit it hold it too.

    The system releases the lock when the last of them ends, even if it is killed. What a killed command left
    is removed (see `tidy`). Raises VlafitError naming the folder and the process if another command holds the
    lock; `what` is the kind of command.
    """
    made = not Path(folder).exists()
    folder = require_writable(folder)
    try:
        with _locked(folder, what) as handle:
            tidy(folder)
            yield handle
    except BaseException:
        if made and folder.is_dir() and not (folder / LOCK).exists() and is_empty(folder):
            shutil.rmtree(folder)  # a command that failed before it wrote anything leaves no trace
        raise


@contextmanager
def _locked(folder: Path, what: str) -> Iterator[int]:
    with _held(folder, what) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        try:
            yield file.fileno()
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while held: see `_is_at` for others who opened it


@contextmanager
def _held(folder: Path, what: str) -> Iterator[BinaryIO]:
    path = folder / LOCK
    while True:
        with open(path, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                pid = file.read().strip().decode(errors="replace")
                holder = f"another {what} (process {pid})" if pid.isdecimal() else f"another {what}"
                raise VlafitError(
                    f"{folder}: {holder}, or a run that it started, is working here; wait for it or stop it"
                ) from error
            except OSError as error:
                log.warning(
                    "%s: the file system has no locks (%s); %s marks the folder as in use until this command "
                    "ends. Delete it if the machine stops before",
                    folder, error.strerror, OWNER,
                )  # fmt: skip
                with _owned(folder, what):
                    yield file
                return
            if not _is_at(file, path):  # its holder has just removed it
                continue
            if (
                folder / OWNER
            ).exists():  # of a command that got no lock: another machine, or a short failure
                with _owned(folder, what):
                    yield file
            else:
                yield file
            return


@contextmanager
def _owned(folder: Path, what: str) -> Iterator[None]:
    """Hold a lock by creating a file. That of a dead process of this machine is removed."""
    path, own = folder / OWNER, f"{os.getpid()} {socket.gethostname()}\n".encode()
    while True:
        try:
            with open(path, "xb") as file:
                file.write(own)
            break
        except FileExistsError as error:
            try:
                holder = path.read_bytes()
            except FileNotFoundError:
                continue
            pid, _, host = holder.decode(errors="replace").strip().partition(" ")
            if host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid)):
                _remove_if(path, holder)
                continue
            raise VlafitError(
                f"{folder}: another {what} (process {pid or 'unknown'} on {host or 'an unknown machine'}) is "
                f"working here; wait for it or stop it. If it is gone, delete {path}"
            ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_if(path: Path, content: bytes) -> None:
    """Remove a file unless another process has just replaced it."""
    aside = path.with_name(f".{path.name.strip('.')}.{os.getpid()}.partial")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() != content:
        os.link(aside, path)
    aside.unlink()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
