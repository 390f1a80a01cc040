"""Statistics in a dataset's own files that are not those of its rows."""

import json
import shutil
from pathlib import Path

import pytest

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
