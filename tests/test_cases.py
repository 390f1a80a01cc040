"""The tables of docs/troubleshooting.md are those of the tests."""

from pathlib import Path

import pytest

from tests import cases

ROW = 'section="data", report="r", user_has="u", now="n"'


def test_the_tables_of_the_page_are_those_of_the_tests():
    page = cases.PAGE.read_text(encoding="utf-8")
    collected = cases.collect()
    assert {case.section for case in collected} == set(cases.SECTIONS)
    assert cases.updated(page, collected) == page, "python tests/cases.py writes them"


def test_no_report_has_two_answers():
    rows = [(case.report, case.user_has) for case in cases.collect()]
    assert len(set(rows)) == len(rows)


def write(folder: Path, words: str) -> Path:
    path = folder / "test_x.py"
    path.write_text(f"import pytest\n\n\n@pytest.mark.case({words})\ndef test_x():\n    pass\n")
    return path


def test_a_marker_is_a_row_and_another_test_is_none(tmp_path: Path):
    path = write(tmp_path, ROW)
    path.write_text(path.read_text() + "\n\ndef test_y():\n    pass\n")
    assert cases.collect(tmp_path) == [cases.Case("data", "r", "u", "n")]
    assert "| r | u | n |" in cases.tables(cases.collect(tmp_path))["data"]


@pytest.mark.parametrize(
    "words",
    [
        ROW.replace("data", "weather"),
        ROW.replace(', now="n"', ""),
        ROW.replace('"n"', '"a | b"'),
        ROW.replace('"n"', "some_name"),
        ROW.replace('"n"', "3"),
    ],
)
def test_a_marker_that_is_no_row_is_refused_with_its_place(tmp_path: Path, words: str):
    path = write(tmp_path, words)
    with pytest.raises(ValueError, match=f"{path}:4"):
        cases.collect(tmp_path)


def test_a_page_without_the_comments_is_refused():
    with pytest.raises(ValueError, match="cases: checkpoints"):
        cases.updated("text", [])
