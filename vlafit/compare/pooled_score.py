"""Pool the episodes of several seeds, with an interval that is wider if seeds differ.

Episodes of one seed share one training run, so a binomial interval over all episodes is too narrow if seeds
differ by more than chance; then it is widened accordingly (quasi-binomial).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlafit.score import Z_95, Score, overall, wilson


@dataclass(frozen=True)
class Pooled(Score):
    """The score of all seeds together, with an interval that allows for differences between seeds."""

    seeds: tuple[Score, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of success, widened by the dispersion of seeds; for one seed Wilson's."""
        return interval(self.seeds)


def pool(seeds: Sequence[Score]) -> Pooled:
    """Return the pooled score of several seeds."""
    total = sum(seeds, Score(0, 0))
    return Pooled(total.successes, total.episodes, total.errors, tuple(seeds))


def dispersion(scores: Sequence[Score]) -> float:
    """Return the variance between seeds relative to chance: Pearson's chi2 / (seeds - 1), at least 1."""
    valid = [score for score in scores if score.episodes]
    total = overall({str(i): score for i, score in enumerate(valid)})
    rate = total.rate
    if len(valid) < 2 or rate is None or rate in (0.0, 1.0):
        return 1.0
    chi2 = sum(
        (score.successes - score.episodes * rate) ** 2 / (score.episodes * rate * (1 - rate))
        for score in valid
    )
    return max(1.0, chi2 / (len(valid) - 1))


def interval(scores: Sequence[Score]) -> tuple[float, float]:
    """Return the 95 % Wilson interval over all seeds, with the episodes divided by `dispersion`."""
    total = overall({str(i): score for i, score in enumerate(scores)})
    if not total.episodes:
        return 0.0, 1.0
    phi = dispersion(scores)
    return (
        wilson(total.successes, total.episodes) if phi == 1.0 else wilson_share(total, total.episodes / phi)
    )


def wilson_share(score: Score, n: float) -> tuple[float, float]:
    """Return the Wilson interval of a score's rate for `n` episodes, which need not be an integer."""
    share = score.successes / score.episodes
    middle = share + Z_95**2 / (2 * n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
