"""Which way of tuning to choose: strategies under one recipe, budget and judge, and what that allows to say.

`run` carries a comparison out and `write` makes its report. Around them: `arms` (what is compared, and what
all share), `process` (runs as processes of their own), `record` (what is kept of an arm), `pool` (seeds
together, and their interval), `judge` (what may be concluded), `summary`, `charts` and `page` (the report).
"""

import json

from vlafit import files
from vlafit.compare.arms import Options, with_budget
from vlafit.compare.run import Comparison, Observer, run

__all__ = ["Comparison", "Observer", "Options", "run", "with_budget", "write"]


def write(comparison: Comparison) -> None:
    """Write compare.html and compare.json into the comparison's folder."""
    from vlafit.compare import page, summary

    facts = summary.to_json(comparison)
    files.write_atomic(
        comparison.folder / "compare.json", json.dumps(facts, indent=1, allow_nan=False) + "\n"
    )
    files.write_atomic(comparison.folder / "compare.html", page.page(comparison))
