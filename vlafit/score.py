"""Counting outcomes honestly: successes, failures, and errors, which are neither.

An episode whose environment crashed says nothing about the policy. It is counted apart, never as a failure
or a success, and every table and sentence made here shows it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile: a two-sided 95 % interval


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate, as shares in [0, 1].

    With n = 0 nothing is known: (0, 1). Source: E. B. Wilson, JASA 22 (1927), without continuity correction.
    Raises ValueError for counts that cannot be.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes cannot be")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula is exactly 0 and 1, but for the last bits of the root.
    low = 0.0 if successes == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if successes == n else min(1.0, (middle + half) / scale)
    return low, high


@dataclass(frozen=True)
class Score:
    """Outcomes of some episodes. `episodes` counts those that were judged; `errors` are not among them."""

    successes: int
    episodes: int
    errors: int = 0

    @property
    def rate(self) -> float | None:
        """Share of judged episodes that succeeded; None where none was judged."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the success rate."""
        return wilson(self.successes, self.episodes)

    def to_json(self) -> dict[str, float | int | None]:
        """Return the counts, the rate and the interval's ends, `low` and `high`."""
        low, high = self.interval
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "errors": self.errors,
            "rate": self.rate,
            "low": low,
            "high": high,
        }

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.successes + other.successes, self.episodes + other.episodes, self.errors + other.errors
        )

    def __str__(self) -> str:
        """For example ``21/25 = 84 % (95 %: 65 to 94 %), 1 ERROR``."""
        low, high = self.interval
        if self.rate is None:
            text = "0/0 (nothing judged)"
        else:
            share = f"{self.successes}/{self.episodes} = {100 * self.rate:.0f} %"
            text = f"{share} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"
        return text + (f", {self.errors} ERROR{'S' if self.errors > 1 else ''}" if self.errors else "")


def score(outcomes: Iterable[bool | None]) -> Score:
    """Count outcomes: True a success, False a failure, None an error."""
    counted = list(outcomes)
    return Score(counted.count(True), len(counted) - counted.count(None), counted.count(None))


def by_task(tasks: Sequence[str], outcomes: Iterable[tuple[str, bool | None]]) -> dict[str, Score]:
    """Count (task, outcome) pairs for each of `tasks`, in that order. A foreign task is a KeyError."""
    found: dict[str, list[bool | None]] = {task: [] for task in tasks}
    for task, outcome in outcomes:
        found[task].append(outcome)
    return {task: score(of_task) for task, of_task in found.items()}


def overall(scores: Mapping[str, Score]) -> Score:
    """Add the scores of all tasks: each episode counts once."""
    return sum(scores.values(), Score(0, 0))


def table(scores: Mapping[str, Score]) -> str:
    """Return a plain text table, one line a task and one for all; errors have a column."""
    rows = [*scores.items(), ("all tasks", overall(scores))]
    width = max(len("task"), *(len(name) for name, _ in rows))
    lines = [f"{'task':<{width}}  success    rate  95 % interval  errors"]
    for name, one in rows:
        low, high = one.interval
        rate = "-" if one.rate is None else f"{100 * one.rate:.0f} %"
        ends = "-" if one.rate is None else f"{100 * low:.0f} to {100 * high:.0f} %"
        counts = f"{one.successes}/{one.episodes}"
        lines.append(f"{name:<{width}}  {counts:>7}  {rate:>6}  {ends:>13}  {one.errors:>6}")
    return "\n".join(lines)


def errors_notice(one: Score) -> str:
    """Return the sentence that must stand beside a result with errors; empty where there is none."""
    if not one.errors:
        return ""
    all_of_them = one.episodes + one.errors
    return (
        f"INCOMPLETE: {one.errors} of {all_of_them} episodes ended in an error of the environment. They "
        f"count neither as success nor as failure; the rates are over the other {one.episodes}."
    )
