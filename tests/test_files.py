"""Writing that an interruption cannot spoil."""

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from vlafit import files, locks
from vlafit.errors import StorageError, VlafitError


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep/a.txt"
    files.write_atomic(path, "one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_appears_only_when_it_is_finished(tmp_path):
    final = tmp_path / "deep/out"
    with files.new_folder(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert [p.name for p in final.parent.iterdir()] == ["out"]


def test_an_error_leaves_the_old_folder_as_it_was(tmp_path):
    final = tmp_path / "out"
    with files.new_folder(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), files.new_folder(final) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (final / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_replaces_the_old_one_wholly(tmp_path):
    final = tmp_path / "out"
    for name in ("a", "b"):
        with files.new_folder(final) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/stale").write_text("x")
    with files.new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


def test_lines_are_appended_and_a_cut_off_line_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_line(path, '{"a": 1}')
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')
    assert files.read_json_lines(path) == [{"a": 1}]
    files.append_line(path, '{"a": 3}')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a\n{"a": 2}\n')
    with pytest.raises(VlafitError, match="line 2: not JSON"):
        files.read_json_lines(path)
    path.write_text("3\n")
    with pytest.raises(VlafitError, match="line 1: not a JSON object"):
        files.read_json_lines(path)


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(VlafitError, match="cannot read"):
        files.sha256(tmp_path / "b")


@pytest.mark.parametrize(
    "write",
    [
        lambda place: files.write_atomic(place / "a", "x"),
        lambda place: files.append_line(place / "a", "x"),
        lambda place: files.require_writable(place / "a"),
        lambda place: files.new_folder(place / "a").__enter__(),
    ],
)
def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(VlafitError, match="cannot (write|create).*/a: .*/file is a file"):
        write(tmp_path / "file")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    assert files.require_writable(tmp_path / "a/b") == tmp_path / "a/b"
    assert list((tmp_path / "a/b").iterdir()) == []


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    with locks.exclusive(tmp_path, "vlafit compare"):
        files.require_writable(tmp_path)
        for attempt in (locks.exclusive, locks.require_unlocked):
            facts = rf"{tmp_path}: another vlafit compare \(process {os.getpid()}\)"
            with (
                pytest.raises(VlafitError, match=facts),
                attempt(tmp_path, "vlafit compare") or nullcontext(),
            ):
                pass
        assert files.is_empty(tmp_path), "a lock is no content"
    assert list(tmp_path.iterdir()) == []
    locks.require_unlocked(tmp_path, "vlafit compare")
    with locks.exclusive(tmp_path, "vlafit compare"):
        pass


def test_who_locks_a_folder_removes_what_a_killed_process_left_there(tmp_path):
    for name in (".result.json.4711.partial", ".probe.4711", "result.json"):
        (tmp_path / name).write_text("x")
    with locks.exclusive(tmp_path, "vlafit eval"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [files.LOCK, "result.json"]


def test_the_lock_of_a_process_that_is_killed_is_free(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from vlafit import files, locks\n"
        f"with locks.exclusive(Path({str(tmp_path)!r}), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    locks.require_unlocked(tmp_path, "x")


def test_looking_for_a_lock_makes_nothing(tmp_path):
    locks.require_unlocked(tmp_path / "no", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_content_and_is_removed(tmp_path):
    for name in (".probe.41", ".recipe.toml.41.partial", ".best.json.7.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".step_000004.partial").mkdir()
    (tmp_path / ".step_000004.partial" / "half").write_text("half")
    assert files.is_empty(tmp_path)
    (tmp_path / ".keep").write_text("the user's")
    (tmp_path / "notes.partial").write_text("the user's")
    assert not files.is_empty(tmp_path)
    files.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep", "notes.partial"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_whose_replacement_was_interrupted_comes_back(tmp_path, replaced):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    if replaced:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("new")
    files.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == ("new" if replaced else "old")


def test_every_file_and_folder_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "sub" / "empty").mkdir(parents=True)
        (folder / "sub" / "a").write_text("a")
    synced = set(events[: events.index("rename")])
    out = tmp_path / "out"
    assert {
        path.stat().st_ino for path in (out, out / "sub", out / "sub" / "empty", out / "sub" / "a")
    } <= synced


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOLCK", "EOPNOTSUPP"])
def without_flock(request, monkeypatch):
    """A file system that has no locks, as some network file systems; `set` gives them back."""
    real = locks.fcntl.flock

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    def switch(working: bool) -> None:
        monkeypatch.setattr(locks.fcntl, "flock", real if working else refuse)

    switch(False)
    return switch


@pytest.mark.case(
    section="machines",
    report="two commands in one folder",
    user_has="a file system without `flock`",
    now="a lock file with process and machine",
)
def test_without_locks_of_the_file_system_a_folder_is_still_worked_in_by_one_process(tmp_path, without_flock):
    with locks.exclusive(tmp_path, "vlafit train"):
        for attempt in (locks.exclusive, locks.require_unlocked):
            with (
                pytest.raises(
                    VlafitError, match=rf"{tmp_path}: another vlafit train \(process {os.getpid()}"
                ),
                attempt(tmp_path, "vlafit train") or nullcontext(),
            ):
                pass
        assert files.is_empty(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_that_a_file_system_has_no_locks_is_said_with_the_file_that_takes_their_place(
    tmp_path, without_flock, caplog
):
    with locks.exclusive(tmp_path, "vlafit train"):
        pass
    assert all(fact in caplog.text for fact in (str(tmp_path), files.OWNER, "has no locks"))


def test_who_gets_a_lock_still_minds_the_command_that_got_none(tmp_path, without_flock):
    with locks.exclusive(tmp_path, "vlafit train"):
        without_flock(True)  # as on another machine
        with pytest.raises(VlafitError) as caught, locks.exclusive(tmp_path, "vlafit train"):
            pass
        assert f"process {os.getpid()}" in str(caught.value)
    with locks.exclusive(tmp_path, "vlafit train"):
        assert not (tmp_path / files.OWNER).exists()


def test_without_locks_the_folder_of_a_dead_process_is_free_and_that_of_another_machine_is_not(
    tmp_path, without_flock
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=60)
    owner = tmp_path / files.OWNER
    owner.write_text(f"{dead.pid} {socket.gethostname()}\n")
    with locks.exclusive(tmp_path, "x"):
        pass
    owner.write_text(f"{dead.pid} another-machine\n")
    with pytest.raises(VlafitError) as caught, locks.exclusive(tmp_path, "x"):
        pass
    assert "another-machine" in str(caught.value) and f"delete {owner}" in str(caught.value)


def test_a_path_with_a_nul_character_is_refused_as_a_path(tmp_path: Path):
    place = tmp_path / "a\0b"
    for write in (
        lambda: files.require_writable(place),
        lambda: files.write_atomic(place / "file", "x"),
        lambda: files.new_folder(place).__enter__(),
        lambda: locks.exclusive(place, "test").__enter__(),
    ):
        with pytest.raises(StorageError, match="null"):
            write()


def test_two_commands_that_create_one_path_exclude_each_other_and_leave_no_lock(tmp_path: Path):
    place = tmp_path / "parent" / "out"
    with locks.creating(place, "vlafit export"):
        with pytest.raises(VlafitError) as caught, locks.creating(place, "vlafit export"):
            pass
        assert all(fact in str(caught.value) for fact in (str(place), f"process {os.getpid()}"))
        with locks.creating(place.with_name("other"), "vlafit export"):
            pass
    assert list(place.parent.iterdir()) == []


def test_a_folder_that_has_to_be_new_replaces_nothing(tmp_path: Path):
    with (
        pytest.raises(StorageError, match=str(tmp_path / "out")),
        files.new_folder(tmp_path / "out", new=True),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()  # of a program that knows no locks
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_who_creates_a_path_removes_what_killed_processes_left_of_it(tmp_path: Path):
    mine = [".out.partial", ".out.41.partial", ".out.ab.41.partial", ".other.41.partial"]
    for name in mine:
        (tmp_path / name).touch()
    unfinished = files.new_file(tmp_path / "out")
    unfinished.__enter__().touch()
    with locks.creating(tmp_path / "out", "vlafit export"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.41.partial", ".out.ab.41.partial"]


def test_a_kill_while_it_is_tried_whether_a_folder_can_be_written_leaves_no_file(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from vlafit import files\n"
        "def die(event, args):\n"
        "    if event in ('os.remove', 'end'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(die)\n"
        "files.require_writable(Path(sys.argv[1])); sys.audit('end')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])  # killed before anything is removed
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_that_is_not_there_is_named_with_what_it_points_to(tmp_path):
    link = tmp_path / "run"
    link.symlink_to("elsewhere/run")
    for write in (lambda: files.require_writable(link), lambda: files.write_atomic(link / "deep" / "a", "")):
        with pytest.raises(StorageError, match=rf"{link} is a link to elsewhere/run, which is not there"):
            write()
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    files.write_atomic(files.require_writable(link) / "a", "")
    assert (tmp_path / "elsewhere" / "run" / "a").is_file()
