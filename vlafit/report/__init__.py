"""Write the report of a run (one page, one JSON file, one picture) from the run's folder."""

import json
from pathlib import Path

from vlafit import files
from vlafit.report.facts import Facts, read_facts

__all__ = ["Facts", "build", "read_facts"]


def build(run: Path) -> Path:
    """Write report.html, report.json and, if the run was evaluated, result.png into a run folder.

    Returns the page's path. The page of an unfinished run says what is missing. Raises VlafitError if `run`
    is not a run folder, or cannot be read or written.
    """
    from vlafit.report.page import page  # matplotlib, which a run that ends without a report never imports
    from vlafit.report.picture import result_figure

    run = Path(run)
    facts = read_facts(run)
    if facts.evaluations:
        files.write_atomic(run / "result.png", result_figure(facts))
    files.write_atomic(run / "report.json", json.dumps(facts.to_json(), indent=2, allow_nan=False) + "\n")
    files.write_atomic(run / "report.html", page(facts))
    return run / "report.html"
