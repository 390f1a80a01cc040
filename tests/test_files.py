"""Writing that an interruption cannot spoil."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from vlafit import files
from vlafit.errors import VlafitError


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
    with pytest.raises(
        VlafitError, match=r"cannot (write|create).*/a: .*/file is a file, not a folder; choose another path"
    ):
        write(tmp_path / "file")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    assert files.require_writable(tmp_path / "a/b") == tmp_path / "a/b"
    assert list((tmp_path / "a/b").iterdir()) == []


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    with files.exclusive(tmp_path, "vlafit compare"):
        files.require_writable(tmp_path)
        for attempt in (files.exclusive, files.require_unlocked):
            facts = rf"{tmp_path}: another vlafit compare \(process {os.getpid()}\)"
            with (
                pytest.raises(VlafitError, match=facts),
                attempt(tmp_path, "vlafit compare") or nullcontext(),
            ):
                pass
        assert files.is_empty(tmp_path), "a lock is no content"
    assert list(tmp_path.iterdir()) == []
    files.require_unlocked(tmp_path, "vlafit compare")
    with files.exclusive(tmp_path, "vlafit compare"):
        pass


def test_the_lock_of_a_process_that_is_killed_is_free(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from vlafit import files\n"
        f"with files.exclusive(Path({str(tmp_path)!r}), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    files.require_unlocked(tmp_path, "x")


def test_looking_for_a_lock_makes_nothing(tmp_path):
    files.require_unlocked(tmp_path / "no", "x")
    assert list(tmp_path.iterdir()) == []
