"""The tables of eval/README.md about the small policies of real LIBERO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import beside, count, link, outcomes_of, read, score_of, table, with_interval
from libero_full import EVALUATIONS

from vlafit.compare.pooled_score import pool

KNOWN, UNSEEN = "libero-object-small", "libero-object-unseen"
COLUMNS = {
    "before": "before",
    "after": "after",
    "wrong_instruction": "another object's instruction (lower is better)",
}
ARMS = {
    UNSEEN: "full",
    f"{UNSEEN}-lora": "LoRA of rank 16",
    f"{UNSEEN}-untrained": "full, from untrained weights",
}


def by_task(results: Path, run: str) -> str:
    """One row for each task of a published run: before, after, and with another object's instruction."""
    there = [column for column in COLUMNS if (results / run / f"episodes_{column}.jsonl").is_file()]
    played = {column: solved(outcomes_of(results / run, column)) for column in there}
    tasks = dict.fromkeys(task for of in played.values() for task in of)
    rows = [[task.replace("_", " "), *(of[task] for of in played.values())] for task in tasks]
    return table(["task", *(COLUMNS[column] for column in there)], rows)


def solved(outcomes: Mapping[str, bool | None]) -> dict[str, str]:
    """Return task -> `successes of episodes`, and `**all**` at the end, of start -> success."""
    of_task: dict[str, list[bool | None]] = {}
    for start, success in outcomes.items():
        of_task.setdefault(start.rpartition(" ")[0], []).append(success)
    of_task["**all**"] = list(outcomes.values())
    return {task: f"{sum(s is True for s in some)} of {len(some)}" for task, some in of_task.items()}


def unseen(results: Path) -> str:
    """One row for each way of learning the four unseen tasks, and its paired difference from full."""
    runs = {name: {0: results / name} for name in ARMS if (results / name).is_dir()}
    differences = beside(runs, UNSEEN)
    rows = []
    for name, of in runs.items():
        score = with_interval(pool([score_of(of[0], "after")]))
        files = link(f"results/{name}/report.json", f"`{name}`")
        rows.append([ARMS[name], score, *differences[name], files])
    return table(["strategy and start", "success (95 %)", "minus full, points (95 %)", "p", "run"], rows)


def full(results: Path) -> str:
    """One row for each evaluation of `eval/libero_full.py` that was played to its end."""
    rows = []
    for name, evaluation in EVALUATIONS.items():
        path = results / name / "result.json"
        if path.is_file():
            result = read(path)
            rows.append([f"`{name}`", f"`{evaluation.checkpoint}`", f"`{evaluation.protocol}`", told(result),
                         str(result["trials"]), rate(result["overall"]),
                         link(f"results/{results.name}/{name}/episodes.jsonl", "episodes")])  # fmt: skip
    return table(
        ["evaluation", "policy", "protocol", "instruction", "starts a task", "success (95 %)", "files"], rows
    )


def told(result: Mapping[str, Any]) -> str:
    """Return which sentence the policy was given."""
    return "the partner's" if result["wrong_instruction"] else "the task's"


def rate(overall: Mapping[str, Any]) -> str:
    """Return `successes of episodes (95 % interval)`."""
    return f"{count(overall)} ({100 * overall['low']:.0f} to {100 * overall['high']:.0f} %)"
