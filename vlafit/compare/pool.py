"""Episodes of several seeds together, and the interval of their success: wider where seeds differ.

Episodes of one seed share one training run, so counting each once promises too much where seeds differ by
more than chance; there the interval is widened accordingly (quasi-binomial).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlafit.score import Z_95, Score, overall, wilson


@dataclass(frozen=True)
class Pooled(Score):
    """The score of all seeds together; its interval is the one by which strategies are ranked."""

    seeds: tuple[Score, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of success, widened by what seeds differ; of one seed, Wilson's."""
        return interval(self.seeds)


def pool(seeds: Sequence[Score]) -> Pooled:
    """Return the scores of seeds as one."""
    all_of_them = sum(seeds, Score(0, 0))
    return Pooled(all_of_them.successes, all_of_them.episodes, all_of_them.errors, tuple(seeds))


def dispersion(scores: Sequence[Score]) -> float:
    """Return how much more seeds vary than chance would have it: Pearson's chi2 / (seeds - 1), at least 1."""
    judged = [score for score in scores if score.episodes]
    total = overall({str(i): score for i, score in enumerate(judged)})
    rate = total.rate
    if len(judged) < 2 or rate is None or rate in (0.0, 1.0):
        return 1.0
    chi2 = sum(
        (score.successes - score.episodes * rate) ** 2 / (score.episodes * rate * (1 - rate))
        for score in judged
    )
    return max(1.0, chi2 / (len(judged) - 1))


def interval(scores: Sequence[Score]) -> tuple[float, float]:
    """Return the 95 % Wilson interval of seeds pooled, as if there were `dispersion` times fewer episodes."""
    total = overall({str(i): score for i, score in enumerate(scores)})
    if not total.episodes:
        return 0.0, 1.0
    phi = dispersion(scores)
    return (
        wilson(total.successes, total.episodes) if phi == 1.0 else wilson_share(total, total.episodes / phi)
    )


def wilson_share(score: Score, n: float) -> tuple[float, float]:
    """Return the Wilson interval of a score's rate with `n` episodes, not necessarily whole."""
    share = score.successes / score.episodes
    middle = share + Z_95**2 / (2 * n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
