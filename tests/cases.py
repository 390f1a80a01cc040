"""Collect the cases of docs/troubleshooting.md from the tests that show them.

A test that answers a report of users carries a marker, whose words are one row of a table:

    @pytest.mark.case(section="data", report="...", user_has="...", now="...")

`python tests/cases.py` writes the tables into the page; a test compares them. Nothing is imported to collect.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "troubleshooting.md"
HEADER = ("| report | what the user has | what happens now |", "|---|---|---|")
SECTIONS = ("checkpoints", "data", "machines", "runs")


@dataclass(frozen=True)
class Case:
    """One row: what was reported, what the user has, what happens now."""

    section: str
    report: str
    user_has: str
    now: str


def collect(tests: Path = TESTS) -> list[Case]:
    """Return the cases in the order of files and lines. Raises ValueError for a marker that is not one."""
    return [case for path in sorted(tests.rglob("test_*.py")) for case in in_file(path)]


def in_file(path: Path) -> Iterator[Case]:
    """Yield the cases of a test file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.case":
                yield _case(call, f"{path}:{call.lineno}")


def tables(cases: list[Case]) -> dict[str, str]:
    """Return the table of each section as Markdown."""
    rows = {section: list(HEADER) for section in SECTIONS}
    for case in cases:
        rows[case.section].append(f"| {case.report} | {case.user_has} | {case.now} |")
    return {section: "\n".join(lines) for section, lines in rows.items()}


def updated(page: str, cases: list[Case]) -> str:
    """Return the page with each section's table between two comments. Raises ValueError without them."""
    for section, table in tables(cases).items():
        begin, end = f"<!-- cases: {section} -->", f"<!-- end of cases: {section} -->"
        before, found, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        if not (found and ends):
            raise ValueError(f"{PAGE.name} has no {begin} ... {end}")
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return page


def _case(call: ast.Call, where: str) -> Case:
    names = [field.name for field in fields(Case)]
    try:
        values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except ValueError as error:
        raise ValueError(f"{where}: the words of a case are plain text") from error
    if call.args or sorted(values) != sorted(names) or values["section"] not in SECTIONS:
        raise ValueError(f"{where}: a case has {', '.join(names)}; section is one of {', '.join(SECTIONS)}")
    wrong = [text for text in values.values() if not isinstance(text, str) or "|" in text or "\n" in text]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]!r} cannot stand in a table")
    return Case(**values)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), collect()), encoding="utf-8")
    sys.exit(0)
