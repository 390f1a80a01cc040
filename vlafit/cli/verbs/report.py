"""`vlafit report RUN`: write the page of a run again from the run's files."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser


def run(arguments: Sequence[str]) -> int:
    """Write report.html and report.json, and print the page's path."""
    parser = Parser("vlafit report", "Write the report of a run (report.html and report.json) again.")
    parser.add_argument("run", metavar="RUN", help="folder of the run, such as runs/quickstart")
    options = parser.read(arguments)

    from vlafit import report

    print(report.build(Path(options.run)))
    return 0
