"""HDF5 files that hold their bytes elsewhere, cost memory, or cannot be opened: each with its own remedy."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.datasets.layouts import LIBERO, TASKS, card, demos, of_task, write_libero, write_one
from vlafit.datasets import hdf5, open_dataset
from vlafit.datasets.layouts import libero
from vlafit.errors import DataError

DEMOS = demos(3)


def linked_master(folder: Path, sources: Path) -> Path:
    """A file of external links to the demonstrations of `sources`, padded so that a wrong offset reads 0."""
    write_libero(sources, DEMOS)
    folder.mkdir(exist_ok=True)
    master = folder / "all_demo.hdf5"
    with h5py.File(master, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = '{"language_instruction": "do it"}'
        number = 0
        for task in TASKS:
            for i in range(len(of_task(DEMOS, task))):
                target = os.path.relpath(sources / f"{task}_demo.hdf5", folder)
                data[f"demo_{number}"] = h5py.ExternalLink(target, f"data/demo_{i}")
                number += 1
        file["padding"] = np.zeros(1_000_000, np.uint8)
    return master


def test_frames_behind_an_external_link_come_from_the_file_that_holds_them(tmp_path: Path):
    master = linked_master(tmp_path, tmp_path / "parts")
    store = open_dataset(card(master))
    expected = [demo for task in TASKS for demo in of_task(DEMOS, task)]
    for number, demo in enumerate(expected):
        for step in range(len(demo.actions)):
            np.testing.assert_array_equal(store.image(number, step, "front"), demo.front[step])
            np.testing.assert_array_equal(store.image(number, step, "wrist"), demo.wrist[step])
    assert {path.name for path in store.files()} == {"all_demo.hdf5", *(f"{t}_demo.hdf5" for t in TASKS)}


def test_a_link_out_of_the_datasets_folder_is_refused_unless_the_card_lists_it(tmp_path: Path):
    master = linked_master(tmp_path / "set", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"demo_0.*elsewhere.*linked = \["):
        open_dataset(card(master))
    allowed = card(master, section=libero.Section(linked=(str(tmp_path / "elsewhere"),)))
    assert len(open_dataset(allowed).episodes) == len(DEMOS)


def test_a_file_that_is_itself_a_link_out_of_the_folder_is_refused_unless_the_card_lists_it(tmp_path: Path):
    write_libero(tmp_path / "set", DEMOS)
    elsewhere = tmp_path / "elsewhere" / "b_demo.hdf5"
    write_one(elsewhere, DEMOS[0])
    link = tmp_path / "set" / elsewhere.name
    link.symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"set/b_demo.hdf5.*elsewhere.*linked = \["):
        open_dataset(card(tmp_path / "set"))
    allowed = card(tmp_path / "set", section=libero.Section(linked=(str(elsewhere.parent),)))
    assert len(open_dataset(allowed).episodes) == len(DEMOS) + 1
    link.unlink()
    link.symlink_to(write_one(tmp_path / "set" / "parts" / "b_demo.hdf5", DEMOS[0]))
    assert len(open_dataset(card(tmp_path / "set")).episodes) == len(DEMOS) + 1


def test_a_link_that_the_card_itself_names_is_followed(tmp_path: Path):
    master = write_one(tmp_path / "real" / "a_demo.hdf5", DEMOS[0])
    (tmp_path / "b_demo.hdf5").symlink_to(master)
    (tmp_path / "folder").symlink_to(master.parent)
    assert len(open_dataset(card(tmp_path / "b_demo.hdf5")).episodes) == 1
    assert len(open_dataset(card(tmp_path / "folder")).episodes) == 1


def test_a_link_into_the_blobs_of_its_own_download_is_followed(tmp_path: Path):
    download = tmp_path / "datasets--lab--set"
    blob, snapshot = download / "blobs" / "0f", download / "snapshots" / "1a"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_one(tmp_path / "a_demo.hdf5", DEMOS[0]).rename(blob)
    (snapshot / "a_demo.hdf5").symlink_to(blob)
    assert len(open_dataset(card(snapshot)).episodes) == 1


def test_a_link_to_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path):
    file = write_one(tmp_path / "a_demo.hdf5", DEMOS[0])
    with h5py.File(file, "r+") as handle:
        del handle["data/demo_0/obs/agentview_rgb"]
        handle["data/demo_0/obs/agentview_rgb"] = h5py.ExternalLink("gone.hdf5", "x")
    with pytest.raises(DataError, match=r"agentview_rgb.*gone\.hdf5"):
        open_dataset(card(file))


def virtual(tmp_path: Path, source: Path) -> Path:
    demo = DEMOS[0]
    with h5py.File(source, "w") as file:
        file["frames"] = demo.front[:, ::-1, ::-1]
    target = write_one(tmp_path / "a_demo.hdf5", demo)
    layout = h5py.VirtualLayout(demo.front.shape, np.uint8)
    layout[:] = h5py.VirtualSource(source.name, "frames", demo.front.shape)
    with h5py.File(target, "r+") as file:
        del file[f"data/demo_0/{LIBERO['front']}"]
        file.create_virtual_dataset(f"data/demo_0/{LIBERO['front']}", layout)
    return target


def test_a_virtual_dataset_is_read_from_its_source_and_refused_without_it(tmp_path: Path):
    file = virtual(tmp_path, tmp_path / "source.h5")
    np.testing.assert_array_equal(open_dataset(card(file)).image(0, 1, "front"), DEMOS[0].front[1])
    (tmp_path / "source.h5").unlink()
    with pytest.raises(DataError, match=r"agentview_rgb.*source\.h5.*missing"):
        open_dataset(card(file))


def test_a_virtual_dataset_whose_source_lost_its_frames_is_refused(tmp_path: Path):
    file = virtual(tmp_path, tmp_path / "source.h5")
    with h5py.File(tmp_path / "source.h5", "w") as source:
        source["other"] = np.zeros(3)
    with pytest.raises(DataError, match=r"source\.h5 has no /?frames"):
        open_dataset(card(file))


def test_a_file_that_its_writer_never_closed_is_refused_with_the_remedy(tmp_path: Path):
    file = tmp_path / "a_demo.hdf5"
    code = (
        "import h5py, os, sys\n"
        "f = h5py.File(sys.argv[1], 'w', libver='latest'); f['x'] = 1; f.flush(); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    with pytest.raises(DataError, match=r"a_demo\.hdf5.*h5clear -s"):
        open_dataset(card(file))


def test_a_file_that_another_program_has_locked_is_refused_with_the_remedy(tmp_path: Path):
    file = write_one(tmp_path / "a_demo.hdf5", DEMOS[0])
    with open(file, "rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"a_demo\.hdf5.*HDF5_USE_FILE_LOCKING=FALSE"):
            open_dataset(card(file))


def test_frames_compressed_by_a_filter_that_is_not_installed_are_refused_when_opened(tmp_path: Path):
    file = write_one(tmp_path / "a_demo.hdf5", DEMOS[0])
    with h5py.File(file, "r+") as handle:
        key = f"data/demo_0/{LIBERO['front']}"
        del handle[key]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        shape = DEMOS[0].front.shape
        plist.set_chunk((1, *shape[1:]))
        plist.set_filter(32004, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(handle.id, key.encode(), h5py.h5t.STD_U8LE, space, dcpl=plist)
    if h5py.h5z.filter_avail(32004):
        pytest.skip("hdf5plugin is installed and loaded")
    with pytest.raises(DataError, match=r"agentview_rgb.*32004 \(LZ4\).*hdf5plugin"):
        open_dataset(card(file))


def test_hidden_files_are_ignored_and_extra_groups_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = write_libero(tmp_path / "set", DEMOS)
    (folder / "._open_the_drawer_demo.hdf5").write_bytes(b"macOS")
    with h5py.File(folder / f"{TASKS[0]}_demo.hdf5", "r+") as file:
        file["data/normalization/mean"] = np.zeros(4)
    assert len(open_dataset(card(folder)).episodes) == len(DEMOS)
    assert "data/normalization" in caplog.text


def test_memory_does_not_grow_with_the_frames_that_are_read(tmp_path: Path):
    """HDF5's cache of 8 MiB for each open dataset would keep all 30 MB of these frames."""
    size, steps, count = 64, 40, 60
    file = tmp_path / "a_demo.hdf5"
    frames = np.broadcast_to(np.arange(steps, dtype=np.uint8)[:, None, None, None], (steps, size, size, 3))
    with h5py.File(file, "w") as handle:
        handle.create_group("data").attrs["problem_info"] = '{"language_instruction": "do it"}'
        for number in range(count):
            group = handle.create_group(f"data/demo_{number}")
            group["actions"] = np.zeros((steps, 4))
            group["obs/ee_pos"], group["obs/gripper_states"] = np.zeros((steps, 3)), np.zeros((steps, 2))
            for name in ("front", "wrist"):
                group.create_dataset(LIBERO[name], data=frames, chunks=(1, size, size, 3), compression="gzip")
    code = f"""
import resource, sys
from dataclasses import replace
from pathlib import Path
from tests.datasets.layouts import card
from vlafit.datasets import open_dataset
made = card(Path(sys.argv[1]))
cameras = tuple(replace(c, height={size}, width={size}) for c in made.robot.cameras)
store = open_dataset(replace(made, robot=replace(made.robot, cameras=cameras)))
store.image(0, 0, "front")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for epoch in range(3):
    for number in range(len(store.episodes)):
        for step in range({steps}):
            store.image(number, step, "front")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(store._datasets))
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    grown_kib, _ = map(int, done.stdout.split())
    assert grown_kib < 10_000


def test_only_so_many_handles_and_files_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_libero(tmp_path / "set", demos(5), compression="gzip")
    monkeypatch.setattr(hdf5, "OPEN_DATASETS", 3)
    monkeypatch.setattr(hdf5, "OPEN_FILES", 1)
    store = open_dataset(card(folder))
    assert isinstance(store, hdf5.Hdf5Store)
    expected = [d for task in sorted(TASKS) for d in of_task(demos(5), task)]
    for _ in range(2):
        for number, demo in enumerate(expected):
            np.testing.assert_array_equal(store.image(number, 2, "front"), demo.front[2])
            assert len(store._datasets) <= 3 and len(store._handles) <= 1
