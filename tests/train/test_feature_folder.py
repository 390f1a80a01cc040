"""A folder of kept features is filled by several runs at once, by killed ones, and on a full disk."""

import errno
import logging
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.world import assert_same, learned, start, tiny
from tests.waiting import wait_until
from vlafit import files
from vlafit.errors import ConfigError, StorageError
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.feature_storage import FolderStorage

ROW = (torch.arange(12.0).view(3, 4), torch.ones(2, dtype=torch.bfloat16))


def cached(card: Path, folder: Path, **train: object) -> Recipe:
    values = {"steps": 8, "batch_size": 8, "cache": str(folder), "validate_every": 0, "save_every": 0}
    return tiny(card, strategy="expert", train=values | train)


@pytest.fixture(scope="module")
def alone(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and the folder `kept` beside it, which no other run used."""
    folder = tmp_path_factory.mktemp("alone")
    run(cached(card, folder / "kept"), folder / "run")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, which is an OSError as a full disk is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
def test_two_runs_that_fill_one_folder_at_once_are_each_the_run_alone(
    card: Path, alone: Path, tmp_path: Path
) -> None:
    """One of them is killed while it fills the folder; a third goes on with what is there."""
    kept = tmp_path / "kept"
    both = [start(cached(card, kept), tmp_path / name) for name in ("one", "other")]
    killed = start(cached(card, kept, seed=3, steps=400), tmp_path / "killed")
    wait_until(lambda: len(list(kept.rglob("*.safetensors"))) > 2, killed)
    killed.kill()
    said = [process.communicate() for process in (*both, killed)]
    assert [process.returncode for process in both] == [0, 0], said
    for name in ("one", "other"):
        assert_same(learned(tmp_path / name, 8), learned(alone / "run", 8))
    run(cached(card, kept), tmp_path / "third")
    assert_same(learned(tmp_path / "third", 8), learned(alone / "run", 8))
    here, there = contents(kept), contents(alone / "kept")
    assert {name: here[name] for name in there} == there


def test_half_written_rows_of_killed_runs_are_removed_but_not_those_of_runs_that_still_write(
    tmp_path: Path,
) -> None:
    storage = FolderStorage(tmp_path, {"kind": "a test"})
    storage.put("ab12", ROW)
    old, new = (storage.folder / "ab" / f".ab{n}.safetensors.7.partial" for n in (3, 4))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    FolderStorage(tmp_path, {"kind": "a test"})
    assert not old.exists() and new.exists()


def test_processes_of_two_machines_that_have_the_same_number_write_files_of_their_own(tmp_path: Path) -> None:
    """Containers that share a folder often have equal process ids."""
    with files.new_file(tmp_path / "row") as one, files.new_file(tmp_path / "row") as other:
        one.write_bytes(b"same")
        other.write_bytes(b"same")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"same"]


@pytest.mark.parametrize("damage", ["a flipped bit", "another sample's row", "an older file"])
def test_a_row_that_is_not_what_was_written_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    storage = FolderStorage(tmp_path, {"kind": "a test"})
    storage.put("ab12", ROW)
    storage.put("ab34", tuple(tensor + 1 for tensor in ROW))
    path, other = (next(storage.folder.rglob(f"{name}.safetensors")) for name in ("ab12", "ab34"))
    content = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "an older file":
        save_file(load_file(path), path)
    else:
        path.write_bytes(other.read_bytes())
    assert storage.get("ab12") is None
    assert f"{path}: is damaged" in caplog.text
    storage.put("ab12", ROW)
    row = storage.get("ab12")
    assert row is not None and all(a.equal(b) for a, b in zip(row, ROW, strict=True))


def test_a_row_that_another_process_removes_is_not_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FolderStorage(tmp_path, {"kind": "a test"})
    assert storage.get("ab12") is None
    assert not caplog.text


@pytest.mark.case(
    section="runs",
    report="`No space left on device` while features are kept",
    user_has="a `train.cache` folder on a disk that gets full",
    now="a warning; the features are computed anew, and the run has the same bits",
)
def test_a_full_disk_costs_the_cache_and_not_the_run(
    card: Path, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = FolderStorage.put, []

    def limited(self: FolderStorage, digest: str, row: tuple[torch.Tensor, ...]) -> None:
        calls.append(digest)
        if len(calls) < 4:
            return put(self, digest, row)
        with files_of_at_most(2**10):
            return put(self, digest, row)

    monkeypatch.setattr(FolderStorage, "put", limited)
    monkeypatch.setattr("vlafit.train.feature_storage.FULL", (errno.EFBIG,))  # what the limit raises
    run(cached(card, tmp_path / "kept"), tmp_path / "run")
    assert_same(learned(tmp_path / "run", 8), learned(alone / "run", 8))
    (warning,) = [line for line in caplog.messages if "no longer kept" in line]
    assert str(tmp_path / "kept") in warning
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 3
    assert not list((tmp_path / "kept").rglob("*.partial"))


def test_a_folder_that_cannot_be_written_for_another_reason_ends_the_run(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path, {"kind": "a test"})
    (storage.folder / "ab").write_text("a file where a folder belongs")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        storage.put("ab12", ROW)


def test_features_of_other_weights_do_not_count_as_room_that_is_taken_already(
    card: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same run finds its features; one of another seed has other weights, and needs room for its own."""
    free = SimpleNamespace(free=100_000)  # bytes: less than the run needs
    monkeypatch.setattr("vlafit.train.feature_cache.shutil.disk_usage", lambda _: free)
    with caplog.at_level(logging.INFO):
        run(cached(card, alone / "kept"), tmp_path / "again")
    assert "computed for 0 of " in caplog.text
    with pytest.raises(ConfigError, match="no room for the keys and values"):
        run(cached(card, alone / "kept", seed=4), tmp_path / "other")
