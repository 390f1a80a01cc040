"""A memory map is not read once its file has changed, and leaves no file open."""

import gc
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.layouts import card, demos, write_libero
from vlafit.datasets import open_dataset
from vlafit.datasets.mapped import Mapped
from vlafit.datasets.stamps import stamp
from vlafit.errors import DataError

CONTENT = bytes(range(256)) * 40


def open_below(folder: Path) -> int:
    """How many files of this process are open in a folder; other tests' garbage does not count."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux tells which files are open")
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(name.startswith(f"{folder}/") for name in names)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "frames.bin"
    path.write_bytes(CONTENT)
    return path


def test_it_returns_the_bytes_of_the_file_until_that_is_overwritten_or_cut(path: Path):
    mapped = Mapped(str(path), stamp(path))
    assert mapped.bytes().tobytes() == CONTENT
    with pytest.raises(ValueError, match="read-only"):
        mapped.bytes()[0] = 1
    os.truncate(path, 100)  # to read beyond would end the process
    with pytest.raises(DataError, match=r"frames.bin: changed .*\(10,240 bytes, now 100\).*--resume"):
        mapped.bytes()
    path.write_bytes(CONTENT)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed since the dataset was opened; restore it"):
        mapped.bytes()


def test_a_file_that_is_replaced_or_deleted_is_read_as_it_was(path: Path):
    mapped = Mapped(str(path), stamp(path))
    path.with_name("other").write_bytes(CONTENT[::-1])
    path.with_name("other").replace(path)
    assert mapped.bytes().tobytes() == CONTENT
    path.unlink()
    assert mapped.bytes().tobytes() == CONTENT


@pytest.mark.parametrize("known", [(1, 1), None])
def test_a_file_that_is_another_one_or_empty_is_named(known: tuple[int, int] | None, path: Path):
    if known is None:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="frames.bin: (changed|cannot be read)"):
        Mapped(str(path), known)
    with pytest.raises(DataError, match="frames.bin.missing: cannot be read"):
        Mapped(f"{path}.missing", None)
    assert open_below(path.parent) == 0


def test_no_file_stays_open_and_frames_outlive_their_store(tmp_path: Path):
    everything = demos(2)
    store = open_dataset(card(write_libero(tmp_path / "set", everything)))
    frames = [store.sample(number, 0, 4).observation.images["wrist"] for number in range(len(store.episodes))]
    assert open_below(tmp_path) > 0
    store.close()
    again = store.image(0, 0, "wrist")
    del store
    gc.collect()
    np.testing.assert_array_equal(again, frames[0])
    del again, frames
    gc.collect()
    assert open_below(tmp_path) == 0
