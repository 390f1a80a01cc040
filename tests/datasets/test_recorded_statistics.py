"""Statistics in a dataset's own files that are not those of its rows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets.hdf5_writers import aloha
from tests.datasets.layouts import demos, in_file_order
from vlafit.datasets import open_dataset
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.recorded import check_recorded

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lerobot_datasets"
WRITTEN = sorted(path.parents[1] for path in FIXTURES.glob("*/meta/stats.json"))


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: path.name)
def test_statistics_that_lerobot_wrote_are_those_of_the_rows(folder: Path):
    assert check_recorded(open_dataset(folder), Untested()) == []


@pytest.mark.parametrize(("measure", "factor"), [("min", 2.0), ("max", 0.5), ("mean", -3.0), ("std", 4.0)])
def test_stale_statistics_are_named(tmp_path: Path, measure: str, factor: float):
    folder = shutil.copytree(WRITTEN[0], tmp_path / "arm")
    path = folder / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats["action"][measure] = [factor * value + 0.1 for value in stats["action"][measure]]
    path.write_text(json.dumps(stats))
    (finding,) = check_recorded(open_dataset(folder), Untested())
    assert finding.kind == "stale_statistics" and f"states {measure}" in finding.message
    assert "action" in finding.message and "stats.json" in finding.message


@pytest.mark.parametrize("shift", [0, 1])
def test_a_layout_without_statistics_says_so_whatever_rows_its_actions_are_taken_from(
    shift: int, tmp_path: Path
):
    card = aloha(tmp_path / "set", in_file_order(demos(2)))
    untested = Untested()
    check_recorded(open_dataset(replace(card, rows=replace(card.rows, action_shift=shift))), untested)
    assert [test.reason for test in untested.listed()] == ["layout 'aloha' keeps no statistics in its files"]
