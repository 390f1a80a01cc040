"""An ordinary user who may not read or write a file is told so; nothing is called damaged, or removed."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlafit import files
from vlafit.checkpoints.pickles import convert
from vlafit.checkpoints.tensor_files import open_tensors, tensor_names
from vlafit.datasets import hdf5_index
from vlafit.datasets.hdf5_files import open_file
from vlafit.datasets.lerobot import index as lerobot_index
from vlafit.datasets.store import EpisodeInfo
from vlafit.errors import VlafitError
from vlafit.train import checkpointer, data_files

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Be nobody for a while: permissions do not hold for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)


def state(folder: Path) -> None:
    (folder / "training").mkdir(parents=True)
    for name in (checkpointer.FACTS, checkpointer.TENSORS):
        (folder / name).write_text("{}")


CASES: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    # the file: how it is made, how it is read
    "weights": ("w.safetensors", lambda p: save_file({"x": torch.ones(1)}, p), lambda p: open_tensors([p])),
    "header": ("w.safetensors", lambda p: save_file({"x": torch.ones(1)}, p), tensor_names),
    "recording": ("d.hdf5", hdf5, open_file),
    "pickle": (
        "p.bin",
        lambda p: torch.save({"x": torch.ones(1)}, p),
        lambda p: convert(p, p.with_suffix(".safetensors")),
    ),
    "record": ("run.json", lambda p: p.write_text("{}"), lambda p: data_files.changes(p.parent, {})),
    "manifest": (
        "manifest.json",
        lambda p: p.write_text("{}"),
        lambda p: files.read_json_object(p, VlafitError, "copy it again"),
    ),
    "state": (
        "step_000002/training/state.json",
        lambda p: state(p.parents[1]),
        lambda p: checkpointer.read(p.parents[1], ""),
    ),
}


@pytest.mark.case(
    section="machines",
    report="`not a whole safetensors file`, `fetch it again`, `--resume-from`",
    user_has="a file that another user wrote and this one may not read",
    now="one sentence that names file and permission",
)
@pytest.mark.parametrize("name", CASES)
def test_a_file_that_may_not_be_read_is_not_called_damaged(place: Path, name: str):
    relative, make, read = CASES[name]
    path = place / relative
    make(path)
    path.chmod(0)
    with ordinary_user(), pytest.raises(VlafitError) as caught:
        read(path)
    message = str(caught.value)
    assert f"cannot read {path}: Permission denied" in message
    assert not any(word in message for word in ("again", "damaged", "--resume-from", "whole"))


def test_a_folder_that_may_not_be_written_is_named(place: Path):
    with ordinary_user(), pytest.raises(VlafitError, match=f"{place}.*Permission denied"):
        files.require_writable(place / "run")


@pytest.mark.case(
    section="machines",
    report="`model.safetensors: Permission denied`, while all files beside it can be read",
    user_has="checkpoints on a disk that several accounts share",
    now="weights may be read by whom the umask lets; safetensors writes them for the user alone",
)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        with files.new_folder(tmp_path / "step_000002") as partial:
            (partial / "training").mkdir()
            for name in ("model.safetensors", "training/state.safetensors"):
                save_file({"x": torch.ones(1)}, partial / name)
            (partial / "policy.json").write_text("{}")
        with files.new_file(tmp_path / "one.safetensors") as partial:
            save_file({"x": torch.ones(1)}, partial)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    assert modes == dict.fromkeys(
        ("model.safetensors", "state.safetensors", "policy.json", "one.safetensors"), mode
    )


@pytest.mark.case(
    section="machines",
    report="`~/.cache/vlafit: Permission denied`",
    user_has="a home that this account may not enter, or none",
    now="nothing is kept there, which only costs time",
)
def test_a_home_that_may_not_be_entered_only_costs_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    home = place / "home"
    home.mkdir(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.delenv(hdf5_index.SWITCH, raising=False)
    many = [EpisodeInfo(str(n), "t", "t", 1) for n in range(hdf5_index.FEWEST)]
    rows = np.zeros((1, 1), np.float32)
    index = hdf5_index.Index({}, {}, many, [hdf5_index.Episode(rows, rows, ())] * len(many), [])
    with ordinary_user():
        assert hdf5_index.load("0" * 64) is None and lerobot_index.load("0" * 64, []) is None
        hdf5_index.save("0" * 64, index)
        assert not files.is_reachable_file(home / "x")
    assert f"the index of {len(many)} episodes cannot be kept" in caplog.text
