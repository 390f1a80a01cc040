"""Bytes of an HDF5 dataset lie in the dataset's folder and were written, however many hops away they are."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.datasets.layouts import LIBERO, card, demos, write_one
from vlafit.datasets import open_dataset
from vlafit.datasets.hdf5_files import own_values
from vlafit.datasets.layouts import libero
from vlafit.errors import DataError

DEMO = demos(1)[0]
KEY = f"data/demo_0/{LIBERO['front']}"
ROWS = DEMO.front.shape[0]
CHUNK = (1, *DEMO.front.shape[1:])

Write = Callable[[h5py.Group, str, np.ndarray], object]


def dataset(folder: Path, key: str, write: Write) -> Path:
    """Write one demonstration, in which `write` makes the dataset `key` anew."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_one(folder / "a_demo.hdf5", DEMO)
    with h5py.File(file, "r+") as handle:
        old = handle[key]
        assert isinstance(old, h5py.Dataset)
        values = np.asarray(old)
        del handle[key]
        write(handle, key, values)
    return file


def outside(folder: Path) -> Path:
    """A file with frames in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "ext.h5", "w") as file:
        file["frames"] = DEMO.front
    return folder / "ext.h5"


def virtual(file: h5py.Group, name: str, source: str, key: str, rows: int = ROWS) -> None:
    layout = h5py.VirtualLayout(DEMO.front.shape, np.uint8)
    layout[:rows] = h5py.VirtualSource(source, key, DEMO.front.shape)[:rows]
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("hop", ["virtual", "link", "raw"])
def test_bytes_outside_are_refused_two_hops_away(tmp_path: Path, hop: str) -> None:
    away = outside(tmp_path / "away")
    folder = tmp_path / "set"
    folder.mkdir()
    with h5py.File(folder / "between.h5", "w") as between:
        if hop == "virtual":
            virtual(between, "frames", str(away), "frames")
        elif hop == "link":
            between["frames"] = h5py.ExternalLink(str(away), "frames")
        else:
            raw = away.with_name("raw.bin")
            raw.write_bytes(DEMO.front.tobytes())
            shape = DEMO.front.shape
            between.create_dataset("frames", shape, np.uint8, external=[(str(raw), 0, DEMO.front.nbytes)])
    file = dataset(folder, KEY, lambda f, key, _: virtual(f, key, "between.h5", "frames"))
    with pytest.raises(DataError, match=r"agentview_rgb: is stored in .*/away/.*linked = "):
        open_dataset(card(file))
    allowed = card(file, section=libero.Section(linked=(str(tmp_path / "away"),)))
    store = open_dataset(allowed)
    np.testing.assert_array_equal(store.image(0, 1, "front"), DEMO.front[1][::-1, ::-1])


def chunked(rows: range) -> Write:
    def write(file: h5py.Group, key: str, values: np.ndarray) -> None:
        made = file.create_dataset(key, values.shape, values.dtype, chunks=CHUNK, compression="gzip")
        for row in rows:
            made[row] = values[row]

    return write


def resized(file: h5py.Group, key: str, values: np.ndarray) -> None:
    shape = (ROWS - 1, *values.shape[1:])
    made = file.create_dataset(key, shape, values.dtype, chunks=CHUNK, maxshape=(None, *values.shape[1:]))
    made[:] = values[:-1]
    made.resize(ROWS, axis=0)


def unwritten(file: h5py.Group, key: str, values: np.ndarray) -> None:
    file.create_dataset(key, values.shape, values.dtype)


def compact(file: h5py.Group, key: str, values: np.ndarray) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(file.id, key.encode(), kind, space, properties)


def early(rows: range = range(0)) -> Write:
    """Space for all chunks is taken when the dataset is made, as parallel HDF5 does."""

    def write(file: h5py.Group, key: str, values: np.ndarray) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, *values.shape[1:]))
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        made = h5py.Dataset(h5py.h5d.create(file.id, key.encode(), kind, space, properties))
        for row in rows:
            made[row] = values[row]

    return write


def of_unwritten(file: h5py.Group, key: str, values: np.ndarray) -> None:
    unwritten(file, "empty", values)
    virtual(file, key, ".", "empty")


def of_unwritten_elsewhere(file: h5py.Group, key: str, values: np.ndarray) -> None:
    with h5py.File(Path(file.file.filename).with_name("between.h5"), "w") as between:
        unwritten(between, "empty", values)
    virtual(file, key, "between.h5", "empty")


def half(file: h5py.Group, key: str, values: np.ndarray) -> None:
    file["real"] = values
    virtual(file, key, ".", "real", rows=1)


def of_shorter(file: h5py.Group, key: str, values: np.ndarray) -> None:
    file["real"] = values[:-1]
    virtual(file, key, ".", "real")


@pytest.mark.case(
    section="data",
    report="some frames are black, or a column is zero",
    user_has="HDF5 chunks or frames that were never written, short raw files, or a virtual dataset with gaps",
    now="refused when the dataset is opened, by file and key; docs/security.md lists what no file shows",
)
@pytest.mark.parametrize(
    ("key", "write", "fact"),
    [
        (KEY, chunked(range(1, ROWS)), f"1 of its {ROWS} chunks"),
        (KEY, chunked(range(ROWS - 1)), f"1 of its {ROWS} chunks"),
        (KEY, resized, f"1 of its {ROWS} chunks"),
        (KEY, unwritten, "never written"),
        (KEY, early(), "never written"),
        ("data/demo_0/actions", unwritten, "never written"),
        ("data/demo_0/obs/ee_pos", unwritten, "never written"),
        (KEY, of_unwritten, "never written"),
        (KEY, of_unwritten_elsewhere, "never written"),
        (KEY, half, "of its"),
        (KEY, of_shorter, "has not"),
    ],
)
def test_rows_that_were_never_written_are_refused(tmp_path: Path, key: str, write: Write, fact: str) -> None:
    file = dataset(tmp_path / "set", key, write)
    with pytest.raises(DataError) as raised:
        open_dataset(card(file))
    assert all(text in str(raised.value) for text in (str(file), key.removeprefix("data/demo_0/"), fact))


def test_frames_whose_space_was_taken_early_are_read_once_they_are_written(tmp_path: Path) -> None:
    store = open_dataset(card(dataset(tmp_path / "set", KEY, early(range(ROWS)))))
    np.testing.assert_array_equal(store.image(0, 1, "front"), DEMO.front[1])


@pytest.mark.parametrize("factor", [1, 0])
def test_a_column_in_the_files_header_is_read_zeros_included(tmp_path: Path, factor: int) -> None:
    def write(file: h5py.Group, key: str, values: np.ndarray) -> None:
        compact(file, key, values)
        made = file[key]
        assert isinstance(made, h5py.Dataset)
        made[...] = values * factor

    store = open_dataset(card(dataset(tmp_path / "set", "data/demo_0/actions", write)))
    np.testing.assert_allclose(store.actions(0), DEMO.actions * factor, rtol=1e-6)


@pytest.mark.parametrize(("linked", "fact"), [("/", "every file"), ("nowhere", "no folder")])
def test_a_linked_folder_is_a_folder_and_not_the_whole_machine(
    tmp_path: Path, linked: str, fact: str
) -> None:
    file = write_one(tmp_path / "a_demo.hdf5", DEMO)
    with pytest.raises(DataError, match=fact):
        open_dataset(card(file, section=libero.Section(linked=(linked,))))


@pytest.mark.parametrize("kind", ["virtual", "raw"])
def test_a_source_of_frames_that_changes_while_the_dataset_is_open_is_noticed(
    tmp_path: Path, kind: str
) -> None:
    source = outside(tmp_path / "away")
    if kind == "raw":
        source.write_bytes(DEMO.front.tobytes())

    def write(file: h5py.Group, name: str, values: np.ndarray) -> None:
        if kind == "virtual":
            virtual(file, name, str(source), "frames")
        else:
            external = [(str(source), 0, source.stat().st_size)]
            file.create_dataset(name, values.shape, np.uint8, external=external)

    file = dataset(tmp_path / "set", KEY, write)
    opened = open_dataset(card(file, section=libero.Section(linked=(str(source.parent),))))
    assert source in opened.files(), "a run that is resumed compares the files of its data"
    assert opened.image(0, 1, "front").any()
    os.truncate(source, 100)
    with pytest.raises(DataError) as caught:
        opened.image(0, 1, "front")
    assert all(fact in str(caught.value) for fact in (f"{source}: changed", " 100"))


def raw(*pieces: tuple[str, int]) -> Write:
    """Write a dataset whose bytes are in raw files beside it; `pieces` are names and sizes."""

    def write(file: h5py.Group, key: str, values: np.ndarray) -> None:
        external = [(name, 0, size) for name, size in pieces]
        file.create_dataset(key, values.shape, values.dtype, external=external)

    return write


ACTIONS = "data/demo_0/actions"


@pytest.mark.parametrize("key", [KEY, ACTIONS])
def test_raw_bytes_are_read_beside_their_file_wherever_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    values = DEMO.front if key == KEY else np.asarray(DEMO.actions, np.float64)

    def write(file: h5py.Group, name: str, old: np.ndarray) -> None:
        raw(("z.bin", h5py.h5f.UNLIMITED))(file, name, values)

    file = dataset(tmp_path / "set", key, write)
    values.tofile(tmp_path / "set" / "z.bin")
    for folder in ("empty", "decoy"):
        (tmp_path / folder).mkdir()
        if folder == "decoy":
            np.full_like(values, 7).tofile(tmp_path / folder / "z.bin")
        monkeypatch.chdir(tmp_path / folder)
        store = open_dataset(card(file))
        if key == KEY:
            np.testing.assert_array_equal(store.image(0, 1, "front"), DEMO.front[1][::-1, ::-1])
        else:
            np.testing.assert_allclose(store.actions(0), values, rtol=1e-6)


def test_a_place_where_hdf5_would_look_for_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = dataset(tmp_path / "raw", KEY, raw(("z.bin", DEMO.front.nbytes)))
    DEMO.front.tofile(tmp_path / "raw" / "z.bin")
    outside(tmp_path / "virtual")
    mapped = dataset(tmp_path / "virtual", KEY, lambda f, key, _: virtual(f, key, "ext.h5", "frames"))
    for file, variable in ((stored, "HDF5_EXTFILE_PREFIX"), (mapped, "HDF5_VDS_PREFIX")):
        open_dataset(card(file))
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(tmp_path / "elsewhere"))
            with pytest.raises(DataError) as caught:
                open_dataset(card(file))
        assert all(fact in str(caught.value) for fact in (str(file), "agentview_rgb", f"unset {variable}"))


def test_raw_bytes_with_a_relative_name_behind_a_virtual_dataset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with h5py.File(tmp_path / "set" / "between.h5", "w") as between:
        raw(("z.bin", DEMO.front.nbytes))(between, "frames", DEMO.front)
    DEMO.front.tofile(tmp_path / "set" / "z.bin")
    file = dataset(tmp_path / "set", KEY, lambda f, key, _: virtual(f, key, "between.h5", "frames"))
    with pytest.raises(DataError, match=r"agentview_rgb: .*between\.h5 .*\(z\.bin\)"):
        open_dataset(card(file))


@pytest.mark.parametrize("first", [0, 100])
def test_raw_files_with_fewer_bytes_than_the_shape_are_refused(tmp_path: Path, first: int) -> None:
    pieces = [("y.bin", first), ("z.bin", h5py.h5f.UNLIMITED)]
    file = dataset(tmp_path / "set", KEY, raw(*pieces[not first :]))
    DEMO.front.ravel()[:first].tofile(tmp_path / "set" / "y.bin")
    DEMO.front.ravel()[first:-5].tofile(tmp_path / "set" / "z.bin")
    with pytest.raises(DataError) as caught:
        open_dataset(card(file))
    total = DEMO.front.nbytes
    facts = (str(file), "agentview_rgb", "z.bin", f"{total} bytes", f"hold {total - 5}")
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_labels_that_lie_in_other_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        raw(("z.bin", 8))(file, "success", np.zeros(1))
        with pytest.raises(DataError, match="here: success is stored in other files"):
            own_values(file, "success", "here")
