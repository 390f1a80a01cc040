"""The tables of eval/README.md are those that its script makes from the published results."""

from types import ModuleType

import pytest

from tests.eval_scripts import EVAL, script


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
