"""The tables of few demonstrations: what was searched, and the setting fixed before it was played."""

from pathlib import Path

from cells import count, outcomes_of, points, read_lines, runs_by_seed, score_of, table

from vlafit.compare.pooled_score import pool
from vlafit.significance import Pairs, holm, paired_interval, sign_flip_p

RECIPES = {
    "few-demonstrations": "full checkpoint",
    "few-demonstrations-fresh-expert": "fresh action expert",
    "few-demonstrations-untrained": "untrained",
}
STARTS = ("full checkpoint", "fresh expert", "untrained")


def searched(results: Path) -> str:
    """One row for each setting that was searched: success from each start, with one training seed."""
    of_setting: dict[tuple[str, int, int, str, float], dict[str, str]] = {}
    for line in read_lines(results / "search.jsonl"):
        strategy = Path(line["strategy"]).stem
        key = (line["tasks"], line["demonstrations"], line["steps"], strategy, line["lr"])
        of_setting.setdefault(key, {})[line["start"]] = count(line)
    rows = [
        [tasks, str(n), str(steps), strategy, f"{lr:g}", *(of_start.get(one, "") for one in STARTS)]
        for (tasks, n, steps, strategy, lr), of_start in sorted(of_setting.items(), reverse=True)
    ]
    return table(["tasks", "demonstrations", "steps", "strategy", "learning rate", *STARTS], rows)


def published(results: Path) -> str:
    """One row for each starting point of the fixed setting, and its difference from the full checkpoint."""
    runs = runs_by_seed(results / "starts")
    first, *others = [name for name in RECIPES if name in runs]
    outcomes = {name: [outcomes_of(run, "after") for run in of.values()] for name, of in runs.items()}
    pairs = {name: Pairs.of(outcomes[name], outcomes[first]) for name in others}
    p_values = dict(zip(others, holm([sign_flip_p(pairs[name].by_start) for name in others]), strict=True))
    rows = []
    for name in (first, *others):
        score = pool([score_of(run, "after") for run in runs[name].values()])
        low, high = score.interval
        cells = ["", ""]
        if name != first:
            cells = [points(pairs[name].mean, paired_interval(pairs[name])), f"{p_values[name]:.2g}"]
        shown = f"{count(score.to_json())} ({100 * low:.0f} to {100 * high:.0f} %)"
        rows.append([RECIPES[name], f"`{name}`", str(len(runs[name])), shown, *cells])
    head = ["start", "recipe", "seeds", "success (95 %)", "minus full checkpoint, points (95 %)", "p"]
    return table(head, rows)
