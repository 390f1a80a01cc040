"""Locks on folders that commands work in, and on paths that they create.

The system releases a lock when its process ends. File systems without flock get a file that names the owner.
"""

import fcntl
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlafit import files
from vlafit.errors import VlafitError
from vlafit.files import LOCK, OWNER

log = logging.getLogger(__name__)

OWNED = ".owner"  # behind the name of a lock's file: who holds it, on a file system without flock
LOOK_S = 0.01  # how often a waiting process looks there
LONG_WAIT_S = 60.0  # after which it says for whom it waits


def require_unlocked(folder: Path, what: str) -> None:
    """Raise VlafitError if another process holds the folder's lock. Writes nothing."""
    if (folder / LOCK).is_file():
        with _held(folder / LOCK, folder, what):
            pass


@contextmanager
def creating(path: Path, what: str) -> Iterator[None]:
    """Hold a lock beside `path`, a file or folder that a command creates. What a killed one left is removed.

    Raises VlafitError, without touching anything, if another process is creating it, and StorageError if its
    folder cannot be written.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    parent = files.require_writable(path.parent)
    try:
        with _locked(parent / f".{path.name}{LOCK}", path, what):
            files.remove_partials(path)
            yield
    except BaseException:
        for folder in made:  # a command that failed before it wrote anything leaves no trace
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


@contextmanager
def waiting(path: Path, what: str) -> Iterator[None]:
    """Hold a lock beside `path`, a folder that several processes need and one creates; wait for its turn.

    The lock's file stays, because whoever waits has it open.
    """
    path = Path(path)
    lock = files.require_writable(path.parent) / f".{path.name}{LOCK}"
    with if_free(lock) as free:
        if free:
            yield
            return
    log.warning("%s: waiting for another process that is %s", path, what)
    with turn(lock):
        yield


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path`, which stays; wait while another process or thread holds it.

    On a file system without locks the file `path`.owner names who holds it, and others look for its end.
    """
    with open(path, "ab") as file:
        if _flock(file, fcntl.LOCK_EX) is not None:
            yield
            return
        owner = path.with_name(path.name + OWNED)
        began, warned = time.monotonic(), False
        while holder := _claim(owner):
            if not warned and time.monotonic() - began > LONG_WAIT_S:
                warned = True
                log.warning(
                    "%s: waiting for process %s on %s; if it is gone, delete %s", path.parent, *holder, owner
                )
            time.sleep(LOOK_S)
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold the lock that `turn` waits for if nobody holds it, and yield whether it was free."""
    with open(path, "ab") as file:
        free = _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if free is not None:
            yield free
            return
        owner = path.with_name(path.name + OWNED)
        if _claim(owner) is not None:
            yield False
            return
        try:
            yield True
        finally:
            owner.unlink(missing_ok=True)


def _flock(file: BinaryIO, how: int) -> bool | None:
    """Lock a file; return whether that succeeded, and None where the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[int]:
    """Hold the folder's lock and yield its file descriptor; child processes that inherit it hold it too.

    The system releases the lock when the last of them ends, even if it is killed. What a killed command left
    is removed (see `files.tidy`). Raises VlafitError naming the folder and the process if another command
    holds the lock; `what` is the kind of command.
    """
    made = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    folder = files.require_writable(folder)
    try:
        with _locked(folder / LOCK, folder, what) as handle:
            files.tidy(folder)
            yield handle
    except BaseException:
        if made and folder.is_dir() and not (folder / LOCK).exists() and files.is_empty(folder):
            shutil.rmtree(folder)  # a command that failed before it wrote anything leaves no trace
            with suppress(OSError):  # another command writes into one of the folders above
                for above in made[1:]:
                    above.rmdir()
        raise


@contextmanager
def _locked(lock: Path, place: Path, what: str) -> Iterator[int]:
    with _held(lock, place, what) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        try:
            yield file.fileno()
        finally:
            lock.unlink(missing_ok=True)  # while held: see `_is_at` for others who opened it


@contextmanager
def _held(lock: Path, place: Path, what: str) -> Iterator[BinaryIO]:
    """Open and lock the file `lock`; `place` is what an error names."""
    owner = lock.with_name(lock.name + OWNER.removeprefix(LOCK))
    while True:
        with open(lock, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                pid = file.read().strip().decode(errors="replace")
                holder = f"another {what} (process {pid})" if pid.isdecimal() else f"another {what}"
                raise VlafitError(
                    f"{place}: {holder}, or a run that it started, is working here; wait for it or stop it"
                ) from error
            except OSError as error:
                log.warning(
                    "%s: the file system has no locks (%s); %s marks it as in use until this command "
                    "ends. Delete it if the machine stops before",
                    place, error.strerror, owner.name,
                )  # fmt: skip
                with _owned(owner, place, what):
                    yield file
                return
            if not _is_at(file, lock):  # its holder has just removed it
                continue
            if owner.exists():  # of a command that got no lock: another machine, or a short failure
                with _owned(owner, place, what):
                    yield file
            else:
                yield file
            return


@contextmanager
def _owned(path: Path, place: Path, what: str) -> Iterator[None]:
    """Hold a lock by creating a file. That of a dead process of this machine is removed."""
    holder = _claim(path)
    if holder is not None:
        pid, host = holder
        raise VlafitError(
            f"{place}: another {what} (process {pid or 'unknown'} on {host or 'an unknown machine'}) is "
            f"working here; wait for it or stop it. If it is gone, delete {path}"
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _claim(path: Path) -> tuple[str, str] | None:
    """Create the file that says who holds a lock; return process and machine of a living holder instead."""
    while True:
        try:
            with open(path, "xb") as file:
                file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
            return None
        except FileExistsError:
            try:
                holder = path.read_bytes()
            except FileNotFoundError:
                continue
            pid, _, host = holder.decode(errors="replace").strip().partition(" ")
            if host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid)):
                _remove_if(path, holder)
                continue
            return pid, host


def remove_abandoned(folder: Path) -> None:
    """Remove half-written files of dead processes of this machine from a folder that living ones work in."""
    for path in list(folder.iterdir()):
        named = re.fullmatch(rf"\..+\.{files.WRITER}\.partial", path.name)
        if named and path.is_file() and not _is_running(int(named[1])):
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
