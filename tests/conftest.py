"""For all tests: hypothesis draws the same examples every time, and nothing waits without need."""

import gc
import os
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.forked import ForkedPopen

settings.register_profile("vlafit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vlafit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while 700,000 objects are imported, nor look through them in any test.

    It took 6 of the 27 s of CPU of each worker's collection, and a sixth of the tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Let fsync return at once, because no test cuts the power: a run of 8 steps syncs 190 times, 4 ms each.

    A handle that is none is still an error. That files are synced before they are renamed is tested in
    test_files.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()))
        yield


@pytest.fixture(scope="module")
def forked_starts() -> Iterator[None]:
    """Start `python -m vlafit` by a fork of a process that has imported torch (tests/forked.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPopen)
        yield
