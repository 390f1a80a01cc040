"""The table of the search with few demonstrations."""

from pathlib import Path

from cells import count, read_lines, table

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
