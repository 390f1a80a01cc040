"""For all tests: hypothesis draws the same examples every time, and nothing waits without need."""

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.few_steps import sample_in_few_steps
from tests.forked import STARTED, ForkedPopen

settings.register_profile("vlafit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vlafit")
HERE = Path(__file__).parent
RUNS = ("train", "compare", "sweep", "report", "cli", "outside", "offline", "rollout")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files beside this one last: they are short, so no worker waits long for the other."""
    items.sort(key=lambda item: item.path.parent == HERE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let what tests of training set up and do sample actions in few steps (tests/few_steps.py)."""
    if item.path.parent.name not in RUNS:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        sample_in_few_steps(patch)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Let fsync return at once, because no test cuts the power: a run of 8 steps syncs 190 times, 4 ms each.

    A handle that is none is still an error. That files are synced before they are renamed is tested in
    test_files.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()))
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_starts() -> Iterator[None]:
    """Start commands and environments by a fork of a process that has imported what they need.

    See tests/forked.py; `real_starts` is for tests of the start itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPopen)
        yield


@pytest.fixture
def real_starts(forked_starts: None) -> Iterator[None]:
    """Start every process as it is started outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", STARTED)
        yield
