"""The bounded cache where the file system has no locks: as many processes as before, and the same limit."""

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until
from vlafit import locks
from vlafit.datasets.bounded_cache import BoundedCache, _slot
from vlafit.errors import DataError

STAMP = (10, 10**9)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOLCK", "EOPNOTSUPP"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, as some network file systems."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


@pytest.mark.case(
    section="machines",
    report="a remote dataset's cache fails with `No locks available`",
    user_has="a cache folder on a file system without `flock`",
    now="files beside the locks say whose turn it is; those of dead processes are removed",
)
@pytest.mark.usefixtures("without_flock")
def test_many_readers_share_a_cache_and_its_limit(tmp_path: Path) -> None:
    share(tmp_path)


def share(tmp_path: Path) -> None:
    cache, copies = BoundedCache(tmp_path, 45), list[str]()

    def copy(partial: Path) -> None:
        partial.write_bytes(b"x" * 10)
        copies.append(partial.name)
        cache.used()  # looks for what killed processes left, while others copy
        assert partial.is_file()

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: cache.get(tmp_path / "data" / f"{i % 4}", STAMP, copy), range(40)))
    assert sum(got) == len(copies) == len(set(copies)) == 4  # each is copied once
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.get(tmp_path / "data" / f"{i}", STAMP, copy), range(4, 20)))
    assert len(copies) == 20 and cache.used() == 40
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.owner"))


def test_room_is_never_made_by_deleting_locks(tmp_path: Path) -> None:
    share(tmp_path)  # with the locks of this file system
    cache = BoundedCache(tmp_path, 45)
    before = {path: path.stat().st_ino for path in (tmp_path / ".locks").iterdir()}
    for number in range(20, 25):
        cache.get(
            tmp_path / "data" / str(number), STAMP, lambda partial: partial.write_bytes(b"x" * 10) and None
        )
    assert before.items() <= {path: path.stat().st_ino for path in (tmp_path / ".locks").iterdir()}.items()


@pytest.mark.case(
    section="machines",
    report="a dataset read in place fails when several workers copy at once",
    user_has="a `VLAFIT_CACHE_SIZE` that has no room for one file of each worker",
    now="a worker waits for the copies of others to end; an error only where its file fits in no way",
)
def test_a_copy_waits_for_room_that_other_copies_take(tmp_path: Path) -> None:
    fill(tmp_path)


@pytest.mark.usefixtures("without_flock")
def test_a_copy_waits_for_room_without_locks_of_the_file_system(tmp_path: Path) -> None:
    fill(tmp_path)


def fill(folder: Path) -> None:
    waits, copying = threading.Event(), threading.Barrier(5)
    slots = {_slot(path): path for path in (folder / "data" / str(number) for number in range(99))}
    *paths, last = [*slots.values()][:5]  # whose locks are not the same

    class Watched(BoundedCache):
        def _make_room(self, path: Path, size: int) -> bool:
            found = super()._make_room(path, size)
            if not found:
                waits.set()
            return found

    cache = Watched(folder, 45)

    def copy(partial: Path) -> None:
        partial.write_bytes(b"x" * 10)
        copying.wait(10)  # four copies leave no room for the fifth
        assert waits.wait(10)

    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(cache.get, path, STAMP, copy) for path in paths]
        copying.wait(10)
        assert cache.get(last, STAMP, lambda partial: partial.write_bytes(b"x" * 10) and None)
        assert all(one.result(10) for one in first)
    assert last.is_file() and cache.used() <= 40


def test_a_file_that_fits_beside_no_copies_is_refused_at_once(tmp_path: Path) -> None:
    one, two = (tmp_path / "data" / str(number) for number in (1, 2))
    assert _slot(one) != _slot(two)
    cache = BoundedCache(tmp_path, 45)

    def copy(partial: Path) -> None:
        with pytest.raises(DataError, match=r"has 46 bytes.*may hold 45 bytes.*VLAFIT_CACHE_SIZE to more"):
            cache.get(two, (46, 10**9), lambda partial: None)
        partial.write_bytes(b"x" * 10)

    assert cache.get(one, STAMP, copy)
    with pytest.raises(DataError, match="has 46 bytes"):
        cache.get(two, (46, 10**9), lambda partial: None)


def test_a_copy_that_ends_while_room_is_counted_is_counted(tmp_path: Path) -> None:
    one, *others = (tmp_path / "data" / str(number) for number in range(9))
    two = next(path for path in others if _slot(path) != _slot(one))  # else the two take turns
    counting = threading.Event()

    def slow(partial: Path) -> None:
        partial.write_bytes(b"x" * 10)
        assert counting.wait(10)

    thread = threading.Thread(target=lambda: BoundedCache(tmp_path, 15).get(one, STAMP, slow))

    class Interrupted(BoundedCache):
        lists = 0

        def _between(self) -> None:
            """End the other copy after one of the two lists, files and copies, was made."""
            self.lists += 1
            if self.lists == 2:
                counting.set()
                thread.join()

        def _arriving(self, held: str = "") -> Any:
            self._between()
            return super()._arriving(held)

        def _files(self) -> Any:
            self._between()
            return super()._files()

    thread.start()
    wait_until(lambda: (tmp_path / "data" / ".0.10.partial").is_file())
    Interrupted(tmp_path, 15).get(two, STAMP, lambda partial: partial.write_bytes(b"x" * 10) and None)
    assert two.is_file() and BoundedCache(tmp_path, 15).used() == 10


@pytest.mark.usefixtures("without_flock")
def test_what_a_killed_process_left_blocks_nobody(tmp_path: Path, dead: int) -> None:
    cache = BoundedCache(tmp_path, 25)
    left = tmp_path / "data" / ".other.20.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (tmp_path / ".locks").mkdir()
    for name in ("room", *map(str, range(64))):
        (tmp_path / ".locks" / f"{name}.owner").write_text(f"{dead} {socket.gethostname()}\n")
    assert cache.get(
        tmp_path / "data" / "one", STAMP, lambda partial: partial.write_bytes(b"x" * 10) and None
    )
    assert not left.exists() and cache.used() == 10


@pytest.mark.usefixtures("without_flock")
def test_the_turn_of_a_living_process_is_waited_for_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "LONG_WAIT_S", 0.0)
    lock, order = tmp_path / "lock", list[str]()
    owner = tmp_path / "lock.owner"

    def other() -> None:
        with locks.turn(lock):
            order.append("second")

    thread = threading.Thread(target=other)
    with caplog.at_level(logging.WARNING), locks.turn(lock):
        with locks.if_free(lock) as free:
            assert not free
        thread.start()
        wait_until(lambda: str(owner) in caplog.text)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and not owner.exists()
    assert f"process {os.getpid()} on {socket.gethostname()}" in caplog.text


@pytest.mark.usefixtures("without_flock")
def test_a_folder_that_one_creates_for_several_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, order = tmp_path / "deep" / "made", list[str]()

    def other() -> None:
        with locks.waiting(made, "filling it"):
            order.append("second")

    thread = threading.Thread(target=other)
    with caplog.at_level(logging.WARNING), locks.waiting(made, "filling it"):
        thread.start()
        wait_until(lambda: f"{made}: waiting for another process that is filling it" in caplog.text)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
