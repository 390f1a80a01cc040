"""The tables of eval/README.md are those that its script makes from the published results."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.eval_scripts import EVAL, script
from vlafit import files

LONG = "84_starts"  # counted by result_84_starts.json


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return script("readme")


def test_the_published_tables_are_up_to_date(readme: ModuleType) -> None:
    text = (EVAL / "README.md").read_text(encoding="utf-8")
    assert readme.page(text) == text, "stale: run python eval/readme.py"
    assert {match[2] for match in readme.PLACE.finditer(text)} == set(readme.TABLES)


def test_a_number_that_somebody_changed_by_hand_is_stale(readme: ModuleType) -> None:
    text = (EVAL / "README.md").read_text(encoding="utf-8")
    assert readme.page(text.replace("46 of 50", "47 of 50")) == text


# ------------------------------------------------------------------------------- summaries and episodes

REPORTS = sorted(path.parent.relative_to(EVAL) for path in (EVAL / "results").rglob("report.json"))
RESULTS = sorted(
    path.relative_to(EVAL) for path in (EVAL / "results").rglob("result*.json") if path.stem != "results"
)


@pytest.mark.parametrize("folder", REPORTS, ids=str)
def test_a_published_report_counts_the_episodes_beside_it(folder: Path) -> None:
    success = json.loads((EVAL / folder / "report.json").read_text(encoding="utf-8"))["success"]
    played = {path.stem.removeprefix("episodes_") for path in (EVAL / folder).glob("episodes_*.jsonl")}
    assert "after" in played and played - {LONG} <= set(success)
    for evaluation in played & set(success):
        assert counted(EVAL / folder / f"episodes_{evaluation}.jsonl") == counts(success[evaluation])


@pytest.mark.parametrize("result", RESULTS, ids=str)
def test_a_published_result_counts_the_episodes_beside_it(result: Path) -> None:
    found = json.loads((EVAL / result).read_text(encoding="utf-8"))
    episodes = EVAL / result.with_name(result.name.replace("result", "episodes") + "l")
    if not episodes.is_file():
        pytest.skip("has no episodes of its own")
    assert counted(episodes) == counts(found["overall"])
    for task, one in found["tasks"].items():
        assert counted(episodes, task) == counts(one)


def counts(score: dict[str, Any]) -> tuple[int, int, int]:
    return score["successes"], score["episodes"], score["errors"]


def counted(episodes: Path, task: str = "") -> tuple[int, int, int]:
    """Return successes, episodes without errors, and errors of a file of episodes, or of one task of it."""
    lines = [line for line in files.read_json_lines(episodes) if not task or line["task"] == task]
    good = [line for line in lines if not line["error"]]
    return sum(line["success"] for line in good), len(good), len(lines) - len(good)
