"""Frames that are chunks of a file are read through a memory map where they are the frames' bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.datasets.layouts import LIBERO, card, demos, write_one
from vlafit.datasets import hdf5, open_dataset
from vlafit.datasets.hdf5_chunks import frame_offsets
from vlafit.errors import DataError

DEMO = demos(1)[0]
KEY = f"data/demo_0/{LIBERO['front']}"
ROWS, *FRAME = DEMO.front.shape
ONE = (1, *FRAME)
Write = Callable[[h5py.File, np.ndarray], object]


def made(order: list[int] | None = None, **storage: Any) -> Write:
    """Make the dataset with some storage, its rows written in an order."""

    def write(file: h5py.File, values: np.ndarray) -> None:
        dataset = file.create_dataset(KEY, values.shape, np.uint8, **storage)
        for row in order or range(ROWS):
            dataset[row] = values[row]

    return write


def without_its_filter(file: h5py.File, values: np.ndarray) -> None:
    """A dataset with gzip of which one chunk was stored as it is, as HDF5 marks it."""
    dataset = file.create_dataset(KEY, values.shape, np.uint8, chunks=ONE, compression="gzip")
    dataset[:] = values
    dataset.id.write_direct_chunk((1, 0, 0, 0), values[1].tobytes(), filter_mask=1)


def linked(file: h5py.File, values: np.ndarray) -> None:
    beside = Path(file.filename).with_name("beside.h5")
    with h5py.File(beside, "w") as other:
        other.create_dataset("frames", data=values, chunks=ONE)
    file[KEY] = h5py.ExternalLink("beside.h5", "frames")


CASES: dict[str, tuple[Write, bool]] = {
    "a frame a chunk": (made(chunks=ONE), True),
    "written backwards": (made(list(range(ROWS))[::-1], chunks=ONE), True),
    "may grow": (made(chunks=ONE, maxshape=(None, *FRAME)), True),
    "may grow in two directions": (made(chunks=ONE, maxshape=(None, None, *FRAME[1:])), True),
    "in a file beside": (linked, True),
    "gzip": (made(chunks=ONE, compression="gzip"), False),
    "gzip, one chunk without": (without_its_filter, False),
    "shuffled": (made(chunks=ONE, shuffle=True), False),
    "with a checksum": (made(chunks=ONE, fletcher32=True), False),
    "two frames a chunk": (made(chunks=(2, *FRAME)), False),
    "half a frame a chunk": (made(chunks=(1, FRAME[0] // 2, *FRAME[1:])), False),
}


def write(folder: Path, make: Write, userblock: int = 0) -> Path:
    file = write_one(folder / "a_demo.hdf5", DEMO)
    with h5py.File(file, "r") as old, h5py.File(folder / "new.h5", "w", userblock_size=userblock) as new:
        old.copy("data", new)
        values = np.asarray(old[KEY])
        del new[KEY]
        make(new, values)
    return (folder / "new.h5").replace(file)


@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_of_the_file_however_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, userblock: int
):
    make, is_mapped = CASES[case]
    store = open_dataset(card(write(tmp_path, make, userblock)))
    asked: list[int] = []
    real = hdf5.Hdf5Store._read

    def read(self: hdf5.Hdf5Store, frames: Any, camera: Any, step: int, episode: int) -> np.ndarray:
        asked.append(step)
        return real(self, frames, camera, step, episode)

    monkeypatch.setattr(hdf5.Hdf5Store, "_read", read)
    for step in (ROWS - 1, 0, 2, 1):
        np.testing.assert_array_equal(store.image(0, step, "front"), DEMO.front[step])
    mapped = is_mapped and (not userblock or case == "in a file beside")
    assert asked == ([] if mapped else [ROWS - 1, 0, 2, 1])


def test_a_file_that_is_replaced_is_read_as_it_was_and_offsets_of_another_are_never_used(tmp_path: Path):
    file = write(tmp_path, made(chunks=ONE))
    store = open_dataset(card(file))
    store.image(0, 0, "front")
    file.unlink()  # HDF5 truncates no file that is open
    write(tmp_path, made(list(range(ROWS))[::-1], chunks=ONE))
    np.testing.assert_array_equal(store.image(0, 1, "front"), DEMO.front[1])  # of the file that it has open
    store.close()
    with pytest.raises(DataError, match="changed"):
        store.image(0, 1, "front")


def test_offsets_are_not_used_if_the_bytes_there_are_not_the_frame(tmp_path: Path):
    file = write(tmp_path, made(chunks=ONE))
    with h5py.File(file) as opened:
        dataset = opened[KEY]
        assert isinstance(dataset, h5py.Dataset)
        mapped = np.fromfile(file, np.uint8)
        offsets = frame_offsets(dataset, mapped)
        assert offsets is not None and len(set(offsets.tolist())) == ROWS
        assert frame_offsets(dataset, mapped[: int(offsets.max())]) is None
        assert frame_offsets(dataset, 255 - mapped) is None
