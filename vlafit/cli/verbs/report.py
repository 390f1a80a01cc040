"""`vlafit report FOLDER`: write the page of a run or of a comparison again from its files."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser

ABOUT = """\
Write the report of a run (report.html, report.json) or of a comparison (compare.html, compare.json) again.
Nothing is trained or evaluated."""


def run(arguments: Sequence[str]) -> int:
    """Write the page and the JSON file of a run or comparison, and print the page's path."""
    parser = Parser("vlafit report", ABOUT)
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of a run or comparison, such as runs/quickstart"
    )
    folder = Path(parser.read(arguments).folder)
    if (folder / "compare.json").is_file():
        from vlafit import compare
        from vlafit.compare import stored

        compare.write(stored.read(folder))
        print(folder / "compare.html")
        return 0

    from vlafit import report

    print(report.build(folder))
    return 0
