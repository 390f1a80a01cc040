"""The tables of few demonstrations: what was searched, and the setting fixed before it was played."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from cells import (
    beside,
    count,
    evaluation_of,
    every,
    interval,
    outcomes_of,
    pairs_of,
    points,
    pooled,
    read,
    read_lines,
    runs_by_seed,
    score_of,
    table,
    with_interval,
)
from few_demonstrations_strategies import published as published_strategies
from scipy.stats import rankdata

from vlafit.significance import Pairs, holm, paired_interval, sign_flip_p, two_way_interval

RECIPES = {
    "few-demonstrations": "full checkpoint",
    "few-demonstrations-fresh-expert": "fresh action expert",
    "few-demonstrations-untrained": "untrained",
}
STARTS = ("full checkpoint", "fresh expert", "untrained")
SUCCESS = ("successes by seed", "success (95 %)")
NEW_RUNS = "with new training runs (95 %)"


def searched(results: Path) -> str:
    """One row for each setting that was searched with full fine-tuning: success from each start, one seed."""
    of_setting: dict[tuple[str, int, int, float], dict[str, str]] = {}
    for line in read_lines(results / "search.jsonl"):
        if line["strategy"] == "full" and not line["seed"]:
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
        if is_of_strategies(line) and not line["seed"]:
            of_strategy.setdefault(Path(line["strategy"]).stem, {})[line["lr"]] = count(line)
    rates = sorted({lr for of_rate in of_strategy.values() for lr in of_rate})
    rows = [
        [f"`{name}`", *(of_rate.get(lr, "") for lr in rates)] for name, of_rate in sorted(of_strategy.items())
    ]
    return table(["strategy", *(f"rate {lr:g}" for lr in rates)], rows)


def searched_seeds(results: Path) -> str:
    """One row for each strategy searched with more training seeds: successes of each seed, and their sum."""
    of_strategy: dict[str, dict[float, dict[int, int]]] = {}
    for line in read_lines(results / "search.jsonl"):
        if is_of_strategies(line) and line["seed"]:
            of_rate = of_strategy.setdefault(Path(line["strategy"]).stem, {})
            of_rate.setdefault(line["lr"], {})[line["seed"]] = line["successes"]
    rates = sorted({lr for of_rate in of_strategy.values() for lr in of_rate})
    rows = []
    for name, of_rate in sorted(of_strategy.items()):
        cells = {lr: ", ".join(str(of[seed]) for seed in sorted(of)) for lr, of in of_rate.items()}
        sums = {lr: f"{cells[lr]}: {sum(of.values())}" for lr, of in of_rate.items()}
        rows.append([f"`{name}`", *(sums.get(lr, "") for lr in rates)])
    return table(["strategy", *(f"rate {lr:g}" for lr in rates)], rows)


def is_of_strategies(line: dict[str, Any]) -> bool:
    """Whether a point of the search is of the fixed setting, from the full checkpoint."""
    setting = line["tasks"], line["demonstrations"], line["steps"], line["start"]
    return setting == ("faucet", 5, 30, "full checkpoint")


def beside_new_runs(
    runs: Mapping[str, Mapping[int, Path]], baseline: str, evaluation: str
) -> dict[str, tuple[str, str, str]]:
    """Return what `beside` returns, with the interval for new training runs between the two."""
    pairs = pairs_of(runs, baseline, evaluation)
    found = {}
    for name, (difference, p) in beside(runs, baseline, evaluation).items():
        ends = two_way_interval(pairs[name]) if name in pairs else None
        shown = interval(ends) if ends else ""
        found[name] = difference, shown, p
    return found


def published(results: Path) -> str:
    """One row for each starting point of the fixed setting, and its difference from the full checkpoint."""
    found = runs_by_seed(results / "starts")
    runs = {name: found[name] for name in RECIPES if name in found}
    evaluation = evaluation_of(every(runs))
    differences = beside_new_runs(runs, next(iter(runs)), evaluation)
    rows = [
        [
            RECIPES[name],
            f"`{name}`",
            successes(runs[name], evaluation),
            with_interval(pooled(runs[name].values(), evaluation)),
            *differences[name],
        ]
        for name in runs
    ]
    return table(["start", "recipe", *SUCCESS, "minus full checkpoint, points (95 %)", NEW_RUNS, "p"], rows)


def successes(runs: Mapping[int, Path], evaluation: str) -> str:
    """Return the successes of each seed, in the order of seeds."""
    return ", ".join(str(score_of(run, evaluation).successes) for run in runs.values())


def strategies(results: Path) -> str:
    """One row for each strategy at the fixed setting, best first, and its difference from `full`."""
    runs = published_strategies(results / "strategies")
    evaluation = evaluation_of(every(runs))
    differences = beside_new_runs(runs, "full", evaluation)
    rows = []
    for name, of in runs.items():
        reports = [read(run / "report.json") for run in of.values()]
        score = pooled(of.values(), evaluation)
        cells = [
            f"`{name}`",
            f"{reports[0]['recipe']['optim']['lr']:g}",
            successes(of, evaluation),
            with_interval(score),
            *differences[name][:2],  # p is in the table of pairs, corrected over all of them
        ]
        rows.append((-score.successes, cells))
    head = ["strategy", "learning rate", *SUCCESS, "minus full, points (95 %)", NEW_RUNS]
    return table(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def strategy_pairs(results: Path) -> str:
    """One cell for each pair of strategies, row minus column: points, their interval and p."""
    runs = published_strategies(results / "strategies")
    evaluation = evaluation_of(every(runs))
    names = sorted(runs, key=lambda name: -pooled(runs[name].values(), evaluation).successes)
    outcomes = {name: [outcomes_of(run, evaluation) for run in runs[name].values()] for name in names}
    pairs = {(a, b): Pairs.of(outcomes[a], outcomes[b]) for a, b in combinations(names, 2)}
    p_values = holm([sign_flip_p(one.by_start) for one in pairs.values()])
    cells = {
        pair: f"{points(one.mean, paired_interval(one))}, p {p:.2g}"
        for (pair, one), p in zip(pairs.items(), p_values, strict=True)
    }
    rows = [[f"`{a}`", *(cells.get((a, b), "") for b in names[1:])] for a in names[:-1]]
    return table(["row minus column", *(f"`{name}`" for name in names[1:])], rows)


def offline(results: Path) -> str:
    """Rank correlation of success with what was measured on held-out recordings, over all published runs."""
    runs = [path.parent for path in sorted(results.glob("*/*-seed*/report.json"))]
    evaluation = evaluation_of(runs)
    reports = [read(run / "report.json") for run in runs]
    success = [score_of(run, evaluation).rate for run in runs]
    rows = []
    for metric, shown in (("loss", "validation loss"), ("action_error", "error of sampled actions")):
        errors = [report["training"]["metrics"][f"validation/{metric}"]["last"] for report in reports]
        full = [i for i, report in enumerate(reports) if not report["recipe"]["policy"]["fresh"]]
        kinds = (("all", range(len(runs))), ("from the full checkpoint", full))
        for kind, chosen in kinds:
            ranks = [rankdata([values[i] for i in chosen]) for values in (errors, success)]
            rows.append([shown, kind, str(len(chosen)), f"{np.corrcoef(ranks)[0, 1]:+.2f}"])
    return table(["on held-out recordings", "runs", "number", "rank correlation with success"], rows)
