"""Count successes, failures and environment errors, with the Wilson interval of the success rate.

An episode whose environment crashed tells nothing about the policy: it is counted as an error, neither as a
failure nor as a success, and every table and sentence made here shows it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile: a two-sided 95 % interval


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate, as shares in [0, 1].

    Returns (0, 1) for n = 0. Source: E. B. Wilson, JASA 22 (1927), without continuity correction.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes: impossible counts")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At both ends the formula gives exactly 0 and 1, except for rounding in the square root.
    low = 0.0 if successes == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if successes == n else min(1.0, (middle + half) / scale)
    return low, high


@dataclass(frozen=True)
class InvalidAnswers:
    """How many answers of a policy that writes tokens made no chunk of actions."""

    answers: int
    invalid: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "InvalidAnswers | None":
        """Return what a result.json says of them; None where the policy answers with numbers."""
        counted = result.get("invalid_answers")
        return None if counted is None else cls(int(counted["answers"]), int(counted["invalid"]))

    @property
    def rate(self) -> float:
        """Share of the answers that were no chunk."""
        return self.invalid / self.answers if self.answers else 0.0

    def to_json(self) -> dict[str, float]:
        """Return counts and rate for result.json."""
        return {"answers": self.answers, "invalid": self.invalid, "rate": round(self.rate, 6)}

    def __str__(self) -> str:
        return f"{self.invalid} of {self.answers} answers were no chunk of actions ({self.rate:.1%})"


@dataclass(frozen=True)
class Score:
    """Outcomes of some episodes. `episodes` counts successes and failures only; `errors` are not included."""

    successes: int
    episodes: int
    errors: int = 0

    @property
    def rate(self) -> float | None:
        """Successes divided by `episodes`; None if there are no such episodes."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the success rate."""
        return wilson(self.successes, self.episodes)

    def to_json(self) -> dict[str, float | int | None]:
        """Return the counts, the rate, and the interval's ends as `low` and `high`."""
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
            text = "0/0 (no valid episode)"
        else:
            share = f"{self.successes}/{self.episodes} = {100 * self.rate:.0f} %"
            text = f"{share} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"
        return text + (f", {self.errors} ERROR{'S' if self.errors > 1 else ''}" if self.errors else "")


def score(outcomes: Iterable[bool | None]) -> Score:
    """Count outcomes: True a success, False a failure, None an error."""
    listed = list(outcomes)
    return Score(listed.count(True), len(listed) - listed.count(None), listed.count(None))


def by_task(tasks: Sequence[str], outcomes: Iterable[tuple[str, bool | None]]) -> dict[str, Score]:
    """Count (task, outcome) pairs for each of `tasks`, in that order. Raises KeyError for any other task."""
    by_name: dict[str, list[bool | None]] = {task: [] for task in tasks}
    for task, outcome in outcomes:
        by_name[task].append(outcome)
    return {task: score(of_task) for task, of_task in by_name.items()}


def overall(scores: Mapping[str, Score]) -> Score:
    """Add the scores of all tasks; each episode has the same weight."""
    return sum(scores.values(), Score(0, 0))


def table(scores: Mapping[str, Score]) -> str:
    """Return a plain text table: one line per task and one for all tasks, with a column for errors."""
    rows = [*scores.items(), ("all tasks", overall(scores))]
    width = max(len("task"), *(len(name) for name, _ in rows))
    lines = [f"{'task':<{width}}  success    rate  95 % interval  errors"]
    for name, row in rows:
        low, high = row.interval
        rate = "-" if row.rate is None else f"{100 * row.rate:.0f} %"
        ends = "-" if row.rate is None else f"{100 * low:.0f} to {100 * high:.0f} %"
        counts = f"{row.successes}/{row.episodes}"
        lines.append(f"{name:<{width}}  {counts:>7}  {rate:>6}  {ends:>13}  {row.errors:>6}")
    return "\n".join(lines)


def errors_notice(total: Score) -> str:
    """Return the warning to show beside a result with environment errors; "" if there are none."""
    if not total.errors:
        return ""
    started = total.episodes + total.errors
    return (
        f"INCOMPLETE: {total.errors} of {started} episodes ended in an environment error. They "
        f"count neither as success nor as failure; the rates are over the other {total.episodes}."
    )
