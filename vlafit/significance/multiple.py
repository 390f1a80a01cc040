"""Correct p-values for many pairs, and collect the strategies that no other one beats."""

from collections.abc import Iterable, Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the given order.

    Rejecting those at or below alpha keeps the probability of any false rejection at alpha.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def best_set(names: Iterable[str], better: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return the names that are second in no (better, worse) pair, in the given order.

    They cannot be told apart from the best. All pairs count, not only those with the highest rate: testing
    against the strategy that happens to lead would be a selection.
    """
    beaten = {worse for _, worse in better}
    return tuple(name for name in names if name not in beaten)
