"""The tables of few demonstrations: what was searched, and the setting fixed before it was played."""

from pathlib import Path
from typing import Any

import numpy as np
from cells import beside, count, pooled, read, read_lines, runs_by_seed, table, with_interval
from few_demonstrations_strategies import published as published_strategies
from scipy.stats import rankdata

RECIPES = {
    "few-demonstrations": "full checkpoint",
    "few-demonstrations-fresh-expert": "fresh action expert",
    "few-demonstrations-untrained": "untrained",
}
STARTS = ("full checkpoint", "fresh expert", "untrained")


def searched(results: Path) -> str:
    """One row for each setting that was searched with full fine-tuning: success from each start, one seed."""
    of_setting: dict[tuple[str, int, int, float], dict[str, str]] = {}
    for line in read_lines(results / "search.jsonl"):
        if line["strategy"] == "full":
            key = (line["tasks"], line["demonstrations"], line["steps"], line["lr"])
            of_setting.setdefault(key, {})[line["start"]] = count(line)
    rows = [
        [tasks, str(n), str(steps), f"{lr:g}", *(of_start.get(one, "") for one in STARTS)]
        for (tasks, n, steps, lr), of_start in sorted(of_setting.items(), reverse=True)
    ]
    return table(["tasks", "demonstrations", "steps", "learning rate", *STARTS], rows)


def searched_strategies(results: Path) -> str:
    """One row for each strategy that was searched at the fixed setting: success at each rate, one seed."""
    of_strategy: dict[str, dict[float, str]] = {}
    for line in read_lines(results / "search.jsonl"):
        if is_of_strategies(line):
            of_strategy.setdefault(Path(line["strategy"]).stem, {})[line["lr"]] = count(line)
    rates = sorted({lr for of_rate in of_strategy.values() for lr in of_rate})
    rows = [
        [f"`{name}`", *(of_rate.get(lr, "") for lr in rates)] for name, of_rate in sorted(of_strategy.items())
    ]
    return table(["strategy", *(f"rate {lr:g}" for lr in rates)], rows)


def is_of_strategies(line: dict[str, Any]) -> bool:
    """Whether a point of the search is of the fixed setting, from the full checkpoint."""
    setting = line["tasks"], line["demonstrations"], line["steps"], line["start"]
    return setting == ("faucet", 5, 30, "full checkpoint")


def published(results: Path) -> str:
    """One row for each starting point of the fixed setting, and its difference from the full checkpoint."""
    runs = runs_by_seed(results / "starts")
    names = [name for name in RECIPES if name in runs]
    differences = beside({name: runs[name] for name in names}, names[0])
    rows = [
        [
            RECIPES[name],
            f"`{name}`",
            str(len(runs[name])),
            with_interval(pooled(runs[name].values(), "after")),
            *differences[name],
        ]
        for name in names
    ]
    head = ["start", "recipe", "seeds", "success (95 %)", "minus full checkpoint, points (95 %)", "p"]
    return table(head, rows)


def strategies(results: Path) -> str:
    """One row for each strategy at the fixed setting, best first, and its difference from `full`."""
    runs = published_strategies(results / "strategies")
    differences = beside(runs, "full")
    rows = []
    for name, of in runs.items():
        reports = [read(run / "report.json") for run in of.values()]
        score = pooled(of.values(), "after")
        cells = [
            f"`{name}`",
            f"{reports[0]['recipe']['optim']['lr']:g}",
            ", ".join(map(str, of)),
            with_interval(score),
            *differences[name],
        ]
        rows.append((-score.successes, cells))
    head = [
        "strategy",
        "learning rate",
        "seeds",
        "success (95 %)",
        "minus full, points (95 %)",
        "p",
    ]
    return table(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def offline(results: Path) -> str:
    """Rank correlation of success with what was measured on held-out recordings, over all published runs."""
    runs = [path.parent for path in sorted(results.glob("*/*-seed*/report.json"))]
    reports = [read(run / "report.json") for run in runs]
    success = [report["success"]["after"]["rate"] for report in reports]
    rows = []
    for metric, shown in (("loss", "validation loss"), ("action_error", "error of sampled actions")):
        errors = [report["training"]["metrics"][f"validation/{metric}"]["last"] for report in reports]
        full = [i for i, report in enumerate(reports) if not report["recipe"]["policy"]["fresh"]]
        kinds = (("all", range(len(runs))), ("from the full checkpoint", full))
        for kind, chosen in kinds:
            ranks = [rankdata([values[i] for i in chosen]) for values in (errors, success)]
            rows.append([shown, kind, str(len(chosen)), f"{np.corrcoef(ranks)[0, 1]:+.2f}"])
    return table(["on held-out recordings", "runs", "number", "rank correlation with success"], rows)
