"""The tables of few demonstrations: what was searched, and the setting fixed before it was played."""

from pathlib import Path

from cells import beside, count, pooled, read_lines, runs_by_seed, table, with_interval

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
