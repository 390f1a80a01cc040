"""Statistics are kept under a hash of the rows, so that what is kept can never be of other rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets.layouts import card, demos, in_file_order, write_libero
from vlafit.codec import Statistics
from vlafit.datasets import Card, arrays_for_statistics, open_dataset, statistics_cache
from vlafit.datasets.hdf5_index import SWITCH
from vlafit.datasets.statistics_cache import statistics_of


def positions(path: Path) -> Card:
    """The card, with actions that can be relative to the state."""
    made = card(path)
    return replace(made, robot=replace(made.robot, control="position"))


EVERYTHING = in_file_order(demos(2))
RELATIVE = (True, False, False, True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SWITCH, str(tmp_path / "cache"))
    monkeypatch.setattr(statistics_cache, "FEWEST_ROWS", 1)
    return tmp_path / "cache" / "statistics"


def plain(statistics: dict[str, Statistics]) -> dict[str, object]:
    return {name: values.to_json() for name, values in statistics.items()}


def test_the_second_time_they_are_read_and_bit_for_bit_those_of_the_rows(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_dataset(positions(write_libero(tmp_path / "set", EVERYTHING)))
    ids = [info.id for info in store.episodes]
    first = plain(statistics_of([store], [ids], 3, RELATIVE))
    arrays = arrays_for_statistics(store, ids, 3, RELATIVE)
    assert first == {n: Statistics.of(a).to_json() for n, a in zip(("state", "action"), arrays, strict=True)}
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Statistics, "of_blocks", None)
    moved = tmp_path / "elsewhere"
    (tmp_path / "set").rename(moved)
    again = open_dataset(positions(moved))  # other paths and times, the same rows
    assert plain(statistics_of([again], [ids], 3, RELATIVE)) == first


def test_other_rows_episodes_or_windows_are_never_mistaken_for_them(cache: Path, tmp_path: Path):
    store = open_dataset(positions(write_libero(tmp_path / "set", EVERYTHING)))
    changed = [replace(EVERYTHING[0], actions=EVERYTHING[0].actions + 1e-3), *EVERYTHING[1:]]
    other = open_dataset(positions(write_libero(tmp_path / "other", changed)))
    ids = [info.id for info in store.episodes]
    asked = [
        (store, ids, 3, RELATIVE),
        (store, ids, 4, RELATIVE),
        (store, ids, 3, ()),
        (store, ids[1:], 3, RELATIVE),
        (store, ids, 3, (False, True, False, True)),
    ]
    for number, (rows, some, chunk, relative) in enumerate(asked, start=1):
        statistics_of([rows], [some], chunk, relative)
        assert len(list(cache.iterdir())) == number
    statistics_of([store], [ids], 9, ())  # without relative dimensions the chunk decides nothing
    assert len(list(cache.iterdir())) == len(asked)
    statistics_of([other], [ids], 3, ())  # one action differs by a thousandth
    assert len(list(cache.iterdir())) == len(asked) + 1


def test_a_damaged_file_is_taken_again_with_a_warning_and_off_keeps_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store = open_dataset(positions(write_libero(tmp_path / "set", EVERYTHING)))
    ids = [info.id for info in store.episodes]
    first = plain(statistics_of([store], [ids], 1))
    (path,) = cache.iterdir()
    path.write_text(path.read_text()[:-40])
    assert plain(statistics_of([store], [ids], 1)) == first
    assert f"{path}: is damaged" in caplog.text
    path.unlink()
    monkeypatch.setenv(SWITCH, "off")
    assert plain(statistics_of([store], [ids], 1)) == first
    assert not list(cache.iterdir())
