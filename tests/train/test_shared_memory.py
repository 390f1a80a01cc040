"""Dataloader workers that fail: without enough shared memory, as in a container, or by damaged data."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.train.world import tiny
from tests.variants import variants
from vlafit.errors import DataError
from vlafit.train import dataloader, run
from vlafit.train.dataloader import _death, _Workers


def end_by(number: int) -> None:
    faulthandler.disable()  # pytest's would print a page
    os.kill(os.getpid(), number)


@pytest.mark.case(
    section="machines",
    report="`Bus error`, `No space left on device` in a dataloader",
    user_has="a container with a small `/dev/shm`, or none",
    now="one sentence: enlarge it, or `data.workers = 0`",
)
@pytest.mark.parametrize(("number", "shared"), [(signal.SIGBUS, True), (signal.SIGKILL, False)])
def test_a_worker_that_ran_out_of_shared_memory_says_so(number: signal.Signals, shared: bool):
    process = multiprocessing.get_context("fork").Process(target=end_by, args=(number,))
    process.start()
    message = _death(process, 3)
    assert number.name in message and "data.workers" in message
    assert ("/dev/shm" in message) is shared


class Damaged(IterableDataset):
    """A dataset with an error that the user can fix."""

    def __iter__(self):
        raise DataError("a.hdf5: changed since the dataset was opened;\nrestore it")


def test_an_error_in_the_data_is_the_same_sentence_from_a_worker_process():
    workers = _Workers(DataLoader(Damaged(), num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(DataError) as caught:
        workers.next()
    assert str(caught.value) == "a.hdf5: changed since the dataset was opened;\nrestore it"


READ_ONLY = "mount --bind $1 /dev/shm && mount -o remount,ro,bind /dev/shm"
SMALL = "mount -t tmpfs -o size=4k none /dev/shm"  # room for one lock, not for all of a loader
TIGHT = "mount -t tmpfs -o size=56k none /dev/shm"  # room for a loader's locks, but not twice
LOADER = """
from torch.utils.data import DataLoader
from vlafit.errors import TrainingError
from vlafit.train.dataloader import _Workers
if __name__ == "__main__":
    try:
        _Workers(DataLoader([1, 2], num_workers=1, multiprocessing_context="spawn"))
    except TrainingError as error:
        print(error)
    else:
        print("data.workers = 0 (now 1) is not needed: /dev/shm was enough")
"""


@pytest.mark.parametrize("mount", variants([READ_ONLY, SMALL, TIGHT], always=[SMALL, TIGHT]))
def test_without_shared_memory_workers_are_refused_with_the_remedy(tmp_path: Path, mount: str):
    own = ["unshare", "--mount", "sh", "-c", f"{mount} && exec $2 $1/loader.py"]
    may = subprocess.run([*own[:3], "-c", mount, "sh", str(tmp_path)], capture_output=True, check=False)
    if may.returncode:
        pytest.skip("this user may not mount")
    (tmp_path / "loader.py").write_text(LOADER)
    command = [*own, "sh", str(tmp_path), sys.executable]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "/dev/shm" in ended.stdout and "data.workers = 0 (now 1)" in ended.stdout
    assert ("was enough" in ended.stdout) == (mount == TIGHT)
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_a_gpu_has_workers_by_default_where_cores_and_shared_memory_allow() -> None:
    gpu, cpu, enough = torch.device("cuda"), torch.device("cpu"), 2**30
    assert [dataloader.workers_for(gpu, cores, 1, enough) for cores in (1, 2, 4, 16)] == [0, 1, 3, 4]
    assert dataloader.workers_for(gpu, 16, 8, enough) == 1  # of each of eight processes
    assert dataloader.workers_for(gpu, 16, 1, 64 * 2**20) == 0  # a container's
    assert dataloader.workers_for(cpu, 16, 1, enough) == 0


def test_a_run_writes_the_workers_that_it_chose(card: Path, tmp_path: Path) -> None:
    recipe = tiny(card, train={"steps": 1})
    assert recipe.data.workers == "auto"
    run(recipe, tmp_path / "run")
    assert "workers = 0" in (tmp_path / "run" / "recipe.toml").read_text()
