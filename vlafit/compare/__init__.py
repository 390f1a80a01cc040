"""Compare tuning strategies under one recipe, budget and protocol, with several seeds.

`run` carries a comparison out and `write` makes its report. The modules: `comparison` (run all arms), `arms`
(what is compared, and what all arms share), `process` (runs as child processes), `arm_record` (arm.json),
`standing` (a strategy's results), `pooled_score` (seeds pooled, with their interval), `pairs` (differences at
shared starts), `judge` (ranking and recommendation), `identity`, `stored` (read a comparison back),
`summary`, `charts` and `page` (the report).
"""

import json

from vlafit import files
from vlafit.compare.arms import Options, with_budget
from vlafit.compare.comparison import Comparison, Observer, run

__all__ = ["Comparison", "Observer", "Options", "run", "with_budget", "write"]


def write(comparison: Comparison) -> None:
    """Write compare.html and compare.json into the comparison's folder."""
    from vlafit.compare import page, summary

    content = summary.to_json(comparison)
    files.write_atomic(
        comparison.folder / "compare.json", json.dumps(content, indent=1, allow_nan=False) + "\n"
    )
    files.write_atomic(comparison.folder / "compare.html", page.page(comparison))
