"""Publish a comparison: its page, its JSON, a picture, and every episode of every arm.

    python eval/comparison.py RUN [--results eval/results/compare]

RUN is a folder of `vlafit compare`; the command that made it is in compare.json.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from vlafit.report.picture import Arm, ablation_figure
from vlafit.score import Score


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, default=Path("eval/results/compare"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    here = f"{Path.cwd()}/"
    for name in ("compare.html", "compare.json"):
        text = (options.run / name).read_text(encoding="utf-8")
        (options.results / name).write_text(text.replace(here, ""), encoding="utf-8")  # no machine's paths
    for arm in sorted((options.run / "arms").iterdir()):
        for episodes in sorted(arm.glob("eval/*/episodes.jsonl")):
            to = options.results / "arms" / arm.name / f"episodes_{episodes.parent.name}.jsonl"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(episodes, to)
    facts = json.loads((options.results / "compare.json").read_text(encoding="utf-8"))
    arms = [
        Arm(one["strategy"], [Score(s["successes"], s["episodes"], s["errors"]) for s in seeds.values()])
        for one in facts["strategies"]
        if (seeds := one["success"]["after"]["seeds"])
    ]
    (options.results / "figure.png").write_bytes(ablation_figure(arms))
    print(facts["verdict"]["sentence"], facts["verdict"]["reason"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
