"""Look at a comparison after every start, and stop early, without raising the error rate.

Under the hypothesis that two strategies are alike, a start at which they differ favours either with
probability 1/2. The likelihood ratio of a Beta(1/2, 1/2) mixture of other probabilities against 1/2 is then a
martingale that starts at 1, so the probability that it ever reaches 1 / alpha is at most alpha (Ville's
inequality; mixture martingales: Robbins, Annals of Mathematical Statistics 41, 1970; Howard et al., Annals of
Statistics 49, 2021). So the p-value 1 / (its highest value so far) may be looked at as often as one likes.
"""

from collections.abc import Iterable

from scipy.special import betaln

PRIOR = 0.5  # of the mixture (Krichevsky and Trofimov): loses at most about half a log of the starts
LOG_2 = 0.6931471805599453


def log_evidence(wins: int, losses: int) -> float:
    """Return the logarithm of the mixture's likelihood ratio against probability 1/2."""
    return float(betaln(wins + PRIOR, losses + PRIOR) - betaln(PRIOR, PRIOR) + (wins + losses) * LOG_2)


def anytime_p(by_start: Iterable[int]) -> float:
    """Return the p-value after the starts so far; valid at any time, for any reason to stop.

    `by_start` are differences summed over training seeds, in the order in which starts were played. Only
    their signs are used.
    """
    return _path(by_start)[-1]


def first_rejection(by_start: Iterable[int], alpha: float = 0.05) -> int | None:
    """Return the number of starts after which a test at level `alpha` could have stopped; None if never."""
    path = _path(by_start)
    return next((count for count, p in enumerate(path) if p <= alpha), None)


def _path(by_start: Iterable[int]) -> list[float]:
    """Return the p-value after 0, 1, 2, ... starts."""
    wins = losses = 0
    path = [1.0]
    for value in by_start:
        wins += value > 0
        losses += value < 0
        from_now = _p(log_evidence(wins, losses))
        path.append(min(path[-1], from_now))
    return path


def _p(log_ratio: float) -> float:
    return min(1.0, 2.0 ** (-log_ratio / LOG_2))
