"""`vlafit report FOLDER`: write the page of a run or of a comparison again from its files."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser

ABOUT = """\
Write the report of a run (report.html, report.json), of a comparison (compare.html, compare.json) or of an
evaluation on recorded episodes again. Nothing is trained or evaluated. With --figures, also write its charts,
or those of a sweep's page, as SVG files for papers."""


def run(arguments: Sequence[str]) -> int:
    """Write the page and the JSON file of a run or comparison, and print the page's path."""
    parser = Parser("vlafit report", ABOUT)
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of a run or comparison, such as runs/quickstart"
    )
    parser.add_argument("--figures", metavar="DIR", help="write the charts into DIR, each as an SVG file")
    options = parser.read(arguments)
    page = _page(Path(options.folder))
    print(page)
    if options.figures is not None:
        from vlafit.report.paper import write_figures

        for path in write_figures(page.read_text(encoding="utf-8"), Path(options.figures)):
            print(path)
    return 0


def _page(folder: Path) -> Path:
    """Write the page of a folder again, and return its path; a sweep's stays as it is."""
    if (folder / "compare.json").is_file():
        from vlafit import compare
        from vlafit.compare import stored

        compare.write(stored.read(folder))
        return folder / "compare.html"
    if (folder / "sweep.html").is_file():
        return folder / "sweep.html"  # `vlafit sweep` writes it, with its database open

    if not (folder / "recipe.toml").is_file() and (folder / "samples").is_dir():
        from vlafit.report import offline

        return offline.build(folder)

    from vlafit import report

    return report.build(folder)
