"""Thousands of episodes open without reading their files again, and a file that changes is noticed."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.datasets.hdf5_writers import maniskill, robotwin
from tests.datasets.layouts import TASKS, card, demos, in_file_order, write_libero
from vlafit.datasets import hdf5, hdf5_index, open_dataset
from vlafit.datasets.hdf5_index import SWITCH
from vlafit.errors import DataError

EVERYTHING = in_file_order(demos(3))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(SWITCH, str(tmp_path / "cache"))
    monkeypatch.setattr(hdf5_index, "FEWEST", 1)
    yield tmp_path / "cache" / "datasets"


def test_a_second_opening_reads_no_file_and_gives_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    first = open_dataset(made)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(hdf5, "open_file", None)
    second = open_dataset(made)
    assert second.episodes == first.episodes and second.files() == first.files()
    for number in range(len(first.episodes)):
        np.testing.assert_array_equal(second.state(number), first.state(number))
        np.testing.assert_array_equal(second.actions(number), first.actions(number))
        np.testing.assert_array_equal(second.image(number, 2, "front"), first.image(number, 2, "front"))
    with pytest.raises(ValueError, match="read-only"):
        second.state(0)[0] = 0


def test_a_file_a_card_or_a_sentence_that_changes_is_read_again(cache: Path, tmp_path: Path):
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    open_dataset(made)
    with h5py.File(tmp_path / "set" / f"{TASKS[0]}_demo.hdf5", "r+") as file:
        file["data/demo_0/actions"][0, 0] = 5  # type: ignore[index]
    assert 5 in [open_dataset(made).actions(n)[0, 0] for n in range(len(EVERYTHING))]
    words = robotwin(tmp_path / "words", EVERYTHING)
    open_dataset(words)
    for path in (tmp_path / "words").rglob("*.json"):
        path.write_text('{"seen": ["sing"]}')
    assert {info.instruction for info in open_dataset(words).episodes} == {"sing"}
    lengths = maniskill(tmp_path / "lengths", EVERYTHING)
    open_dataset(lengths)
    path = tmp_path / "lengths" / f"{TASKS[0]}.json"
    path.write_text(path.read_text().replace('"elapsed_steps": 4', '"elapsed_steps": 3'))
    with pytest.raises(DataError, match=r"traj_0.*4 actions, its JSON says 3"):
        open_dataset(lengths)


def test_a_damaged_index_and_a_folder_that_cannot_be_written_to_only_cost_time(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    made = card(write_libero(tmp_path / "set", EVERYTHING))
    open_dataset(made)
    next(cache.iterdir()).write_bytes(b"PK\x03\x04 not an index")
    assert len(open_dataset(made).episodes) == len(EVERYTHING)
    assert "the index is damaged" in caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(SWITCH, str(tmp_path / "file"))
    assert len(open_dataset(made).episodes) == len(EVERYTHING)
    assert "cannot be kept" in caplog.text
    monkeypatch.setenv(SWITCH, "off")
    assert len(open_dataset(made).episodes) == len(EVERYTHING)
