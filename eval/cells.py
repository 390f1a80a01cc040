"""Read published runs, and write their figures as cells of a Markdown table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlafit.compare.pooled_score import Pooled, pool
from vlafit.score import Score
from vlafit.significance import Pairs, holm, paired_interval, sign_flip_p

LONG = "84_starts"  # the evaluation of few demonstrations that has 500 episodes over three seeds


def runs_by_seed(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the published runs in a folder, of each recipe by seed: of the seeds that all recipes have."""
    runs: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*-seed*/report.json")):
        name, _, seed = path.parent.name.rpartition("-seed")
        runs.setdefault(name, {})[int(seed)] = path.parent
    complete = set.intersection(*(set(of) for of in runs.values())) if runs else set[int]()
    return {name: {seed: of[seed] for seed in sorted(complete)} for name, of in runs.items()}


def outcomes_of(run: Path, evaluation: str) -> dict[str, bool | None]:
    """Return start -> success, None for an environment error, of a published evaluation."""
    lines = read_lines(run / f"episodes_{evaluation}.jsonl")
    return {f"{e['task']} {e['seed']}": None if e["error"] else e["success"] for e in lines}


def every(runs: Mapping[str, Mapping[int, Path]]) -> list[Path]:
    """Return the published runs of all recipes and seeds."""
    return [run for of in runs.values() for run in of.values()]


def evaluation_of(runs: Iterable[Path]) -> str:
    """Return the evaluation to compare runs by: the one of 84 starts a task, if all of them have it."""
    return LONG if all((run / f"result_{LONG}.json").is_file() for run in runs) else "after"


def score_of(run: Path, evaluation: str) -> Score:
    """Return the successes of a published evaluation."""
    if evaluation == LONG:
        counts = read(run / f"result_{LONG}.json")["overall"]
    else:
        counts = read(run / "report.json")["success"][evaluation]
    return Score(counts["successes"], counts["episodes"], counts["errors"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> dict[str, Any]:
    """Return a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def count(score: Mapping[str, Any]) -> str:
    """Return `successes of episodes`."""
    return f"{score['successes']} of {score['episodes']}"


def pooled(runs: Iterable[Path], evaluation: str) -> Pooled:
    """Return the successes of an evaluation of several runs together."""
    return pool([score_of(run, evaluation) for run in runs])


def with_interval(score: Pooled) -> str:
    """Return `successes of episodes (95 % interval)`."""
    low, high = score.interval
    return f"{count(score.to_json())} ({100 * low:.0f} to {100 * high:.0f} %)"


def beside(
    runs: Mapping[str, Mapping[int, Path]], baseline: str, evaluation: str = "after"
) -> dict[str, tuple[str, str]]:
    """Return the difference of each recipe from the baseline at equal starts, and its p; "" for the baseline.

    p is exact, with Holm's correction over all of them.
    """
    pairs = pairs_of(runs, baseline, evaluation)
    p_values = holm([sign_flip_p(one.by_start) for one in pairs.values()])
    found = {
        name: (points(one.mean, paired_interval(one)), f"{p:.2g}")
        for (name, one), p in zip(pairs.items(), p_values, strict=True)
    }
    return {**found, baseline: ("", "")}


def pairs_of(runs: Mapping[str, Mapping[int, Path]], baseline: str, evaluation: str) -> dict[str, Pairs]:
    """Return the outcomes of each recipe but the baseline, paired with the baseline's at equal starts."""
    outcomes = {name: [outcomes_of(run, evaluation) for run in of.values()] for name, of in runs.items()}
    return {name: Pairs.of(of, outcomes[baseline]) for name, of in outcomes.items() if name != baseline}


def points(difference: float, ends: Sequence[float]) -> str:
    """Return a difference of success and its interval in percentage points."""
    return f"{100 * difference:+.0f} {interval(ends)}"


def interval(ends: Sequence[float]) -> str:
    """Return an interval of a difference in percentage points."""
    return f"[{100 * ends[0]:+.0f}, {100 * ends[1]:+.0f}]"


def link(target: str, text: str) -> str:
    """Return a Markdown link."""
    return f"[{text}]({target})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    rule = "|" + "---|" * len(head)
    lines = [rule if row is None else f"| {' | '.join(row)} |" for row in (head, None, *rows)]
    return "".join(f"{line}\n" for line in lines)
