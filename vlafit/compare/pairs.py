"""Compare every pair of strategies at the starts that both played."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from vlafit.compare.standing import Standing
from vlafit.significance import (
    Pairs,
    anytime_p,
    first_rejection,
    holm,
    paired_interval,
    sign_flip_p,
    two_way_interval,
)

ALPHA = 0.05  # probability of any wrong ranking


@dataclass(frozen=True)
class PairResult:
    """Difference of two strategies at shared starts, first minus second."""

    first: str
    second: str
    seeds: int
    """Training seeds that both have."""
    starts: int
    """Starts that both played."""
    difference: float
    interval: tuple[float, float]
    """95 % interval over new starts, for these training runs."""
    interval_new_runs: tuple[float, float] | None
    """95 % interval over new starts and new training runs; None if it cannot be computed."""
    first_only: int
    """Starts at which the first succeeded under more seeds than the second."""
    second_only: int
    """Starts at which the second succeeded under more seeds than the first."""
    p: float
    """Exact test by start."""
    p_holm: float = 1.0
    """The same, corrected for all pairs."""
    p_anytime: float = 1.0
    """p-value that stays valid if starts are added and the comparison is looked at again."""
    stopped_after: int | None = None
    """Starts after which a sequential test of this pair at 5 % could have stopped; None: not yet."""

    @property
    def better(self) -> tuple[str, str] | None:
        """(better, worse) if the two can be told apart, else None."""
        if self.p_holm > ALPHA:
            return None
        return (self.first, self.second) if self.difference > 0 else (self.second, self.first)


def shared(first: Standing, second: Standing) -> Pairs:
    """Return the outcomes of two strategies at the starts that both played, by the seeds that both have."""
    seeds = [seed for seed in first.outcomes if seed in second.outcomes]
    return Pairs.of([first.outcomes[s] for s in seeds], [second.outcomes[s] for s in seeds])


def compare_pairs(standings: Sequence[Standing]) -> tuple[PairResult, ...]:
    """Compare every pair of strategies; pairs without a shared start are left out."""
    results = []
    for first, second in combinations(standings, 2):
        pairs = shared(first, second)
        if not pairs.starts:
            continue
        by_start = pairs.by_start
        results.append(
            PairResult(
                first=first.strategy,
                second=second.strategy,
                seeds=pairs.first.shape[0],
                starts=pairs.starts,
                difference=pairs.mean,
                interval=paired_interval(pairs),
                interval_new_runs=two_way_interval(pairs),
                first_only=int((by_start > 0).sum()),
                second_only=int((by_start < 0).sum()),
                p=sign_flip_p(by_start),
                p_anytime=anytime_p(map(int, by_start)),
                stopped_after=first_rejection(map(int, by_start), ALPHA),
            )
        )
    adjusted = holm([result.p for result in results])
    return tuple(replace(result, p_holm=p) for result, p in zip(results, adjusted, strict=True))
