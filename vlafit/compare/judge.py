"""Rank strategies as far as the results allow, and recommend one. Pure functions.

Success is compared pair by pair at the shared starts (`pairs`). A strategy with fewer than two finished seeds
is not ranked, because the variation between its training runs is unknown. Without evaluations the last
validation loss is compared, paired by training seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from vlafit.compare.arm_record import AFTER, ArmRecord
from vlafit.compare.pairs import ALPHA, PairResult, compare_pairs, shared
from vlafit.compare.standing import Standing, cheapest, mean
from vlafit.significance import best_set, holm, independent_episodes_needed, paired_t_p, starts_needed


@dataclass(frozen=True)
class Verdict:
    """Ranking and recommendation over all strategies."""

    by: str
    """The compared quantity: "success", "loss", or "" without results."""
    ranked: bool
    """Whether any two can be told apart."""
    better: tuple[tuple[str, str], ...] = ()
    """Pairs of which the first is better than the second."""
    leaders: tuple[str, ...] = ()
    """Strategies that no other one beats, the highest rate first."""
    sentence: str = ""
    recommended: str = ""
    reason: str = ""
    notes: tuple[str, ...] = field(default=())
    pairs: tuple[PairResult, ...] = ()
    """Differences of success at shared starts, for every pair of ranked strategies."""


def judge(standings: Sequence[Standing]) -> Verdict:
    """Rank strategies as far as the tests allow; recommend the cheapest of those that no other one beats."""
    evaluated = [s for s in standings if s.pooled() is not None]
    if evaluated:
        return _by_success(evaluated)
    trained = [s for s in standings if s.losses()]
    if trained:
        return _by_loss(trained)
    return Verdict("", False, sentence="No arm has finished: there are no results to compare.")


# ---------------------------------------------------------------------------------------------------- success


def _by_success(standings: Sequence[Standing]) -> Verdict:
    if all(s.rate == 0 for s in standings):
        sentence = "No strategy succeeded in any episode: there is no ranking and no recommendation."
        return Verdict("success", False, leaders=tuple(s.strategy for s in standings), sentence=sentence)
    enough = sorted((s for s in standings if s.seeds_judged > 1), key=lambda s: -s.rate)
    order = [s for s in enough if s.outcomes]
    notes = [*_too_few_seeds(enough, standings), *_without_outcomes(enough)]
    if len(order) < 2:
        return _nothing_to_compare("success", standings, notes)
    pairs = compare_pairs(order)
    better = tuple(pair.better for pair in pairs if pair.better)
    names = best_set((s.strategy for s in order), better)
    leaders = [s for s in order if s.strategy in names]
    chosen = cheapest(leaders)
    if len(leaders) == 1:
        reason = f"{_result(chosen)}, and it is better than every other strategy"
    else:
        others = ", ".join(f"{s.strategy} {_cost(s)}" for s in leaders if s is not chosen)
        reason = (
            f"{_result(chosen)}; it is the cheapest of the {len(leaders)} that cannot be told apart from the "
            f"best: {_cost(chosen)} ({others})"
        )
    notes += [*_only_these_runs(pairs), *_needed(order[0], chosen)]
    return Verdict(
        "success",
        bool(better),
        better,
        names,
        _ranking(order, better, "success", _tests(pairs)),
        chosen.strategy,
        f"{reason}.",
        tuple(notes),
        pairs,
    )


def _tests(pairs: Sequence[PairResult]) -> str:
    lowest = min((pair.p_holm for pair in pairs), default=1.0)
    return (
        f"exact paired test by start, Holm's correction over {len(pairs)} pairs, level {100 * ALPHA:g} %, "
        f"smallest corrected p {lowest:.2g}"
    )


def _only_these_runs(pairs: Sequence[PairResult]) -> list[str]:
    """Return a note for each ranked pair whose difference may be one of these training runs only."""
    notes = []
    for pair in pairs:
        interval = pair.interval_new_runs
        if pair.better and interval and interval[0] <= 0 <= interval[1]:
            low, high = (100 * end for end in interval)
            notes.append(
                f"{pair.better[0]} is better than {pair.better[1]} for these training runs; {pair.seeds} "
                f"seeds do not show it for new training runs (95 %: {low:+.0f} to {high:+.0f} points)."
            )
    return notes


def _needed(best: Standing, chosen: Standing) -> list[str]:
    """Return a note about the starts that would show that `best` is better than the recommended strategy."""
    if best.rate <= chosen.rate:
        return []
    pairs = shared(best, chosen)
    starts, seeds = starts_needed(pairs), pairs.first.shape[0]
    if pairs.starts < 2 or pairs.mean <= 0 or starts is None:
        return []
    independent = independent_episodes_needed(best.rate, chosen.rate)
    return [
        f"{best.strategy} has the higher rate ({_percent(best)} against {_percent(chosen)}). If that "
        f"difference is real, and the two differ at new starts as often as at these, about {starts:,} starts "
        f"({starts * seeds:,} episodes of each strategy) show it with 80 % power in the exact test of this "
        "pair for these training runs; without shared starts it would take about "
        f"{independent:,} episodes of each. Raise the protocol's trials: more seeds add no new starts."
    ]


def _without_outcomes(standings: Sequence[Standing]) -> list[str]:
    """Return a note about strategies whose records have no outcomes by start."""
    names = [s.strategy for s in standings if not s.outcomes]
    if not names:
        return []
    return [
        f"Not ranked: {', '.join(names)}. The records hold no outcomes by start (an earlier version wrote "
        "them), so strategies cannot be compared at shared starts; run `vlafit report` on the comparison's "
        "folder, which reads them from arms/*/eval/after/episodes.jsonl."
    ]


def _nothing_to_compare(by: str, standings: Sequence[Standing], notes: Sequence[str]) -> Verdict:
    """Return the verdict if fewer than two strategies can be ranked."""
    if len(standings) == 1:
        notes = [f"Only {standings[0].strategy} has results: there is nothing to compare it with."]
    names = tuple(s.strategy for s in standings)
    return Verdict(by, False, leaders=names, sentence=" ".join(notes))


def _too_few_seeds(ranked: Sequence[Standing], standings: Sequence[Standing]) -> list[str]:
    """Return a note about strategies that are not ranked because they have fewer than two finished seeds."""
    too_few = [s.strategy for s in standings if s not in ranked]
    if not too_few:
        return []
    head = "Neither ranked nor recommended" if len(ranked) > 1 else "No ranking and no recommendation"
    seeds = "has one finished seed" if len(too_few) == 1 else "have one finished seed each"
    return [
        f"{head}: {', '.join(too_few)} {seeds}, so the variation between training runs is unknown; "
        "use --seeds 2 or more."
    ]


# ------------------------------------------------------------------------------------------------------- loss


def _by_loss(standings: Sequence[Standing]) -> Verdict:
    enough = [s for s in standings if len(s.losses()) > 1]
    order = sorted(enough, key=lambda s: mean(list(s.losses().values())) or 0.0)
    notes = _too_few_seeds(order, standings)
    if len(order) < 2:
        return _nothing_to_compare("loss", standings, notes)
    better, lowest = lower_losses([(s.strategy, s.losses()) for s in order])
    names = best_set((s.strategy for s in order), better)
    leaders = [s for s in order if s.strategy in names]
    pairs = len(order) * (len(order) - 1) // 2
    tests = (
        "paired t-test of the last validation loss by training seed, Holm's correction over "
        f"{pairs} pair{'s' * (pairs > 1)}, level {100 * ALPHA:g} %, smallest corrected p {lowest:.2g}"
    )
    sentence = _ranking(order, better, "loss", tests)
    chosen = cheapest(leaders)
    reason = (
        "the policies were not evaluated, so this is by validation loss only, which is not success; it is "
        f"the cheapest of the {len(leaders)} that may be the best: {_cost(chosen)}."
    )
    return Verdict("loss", bool(better), better, names, sentence, chosen.strategy, reason, tuple(notes))


def lower_losses(
    losses: Sequence[tuple[str, Mapping[int, float]]],
) -> tuple[tuple[tuple[str, str], ...], float]:
    """Return the pairs of which the first has the lower loss, and the smallest corrected p-value.

    `losses`: name and loss of each training seed. A pair is compared by the seeds that both have.
    """
    compared = []
    for (first, one), (second, other) in combinations(losses, 2):
        compared.append((first, second, [other[seed] - one[seed] for seed in sorted(set(one) & set(other))]))
    adjusted = holm([paired_t_p(differences) for _, _, differences in compared])
    better = tuple(
        (first, second) if sum(differences) > 0 else (second, first)
        for (first, second, differences), p in zip(compared, adjusted, strict=True)
        if p <= ALPHA
    )
    return better, min(adjusted, default=1.0)


# -------------------------------------------------------------------------------------------------- sentences


def _ranking(order: Sequence[Standing], better: Sequence[tuple[str, str]], by: str, tests: str) -> str:
    if not better:
        return f"No ranking: no two of the {len(order)} strategies can be told apart ({tests})."
    lines = []
    for standing in order:
        worse = [b for a, b in better if a == standing.strategy]
        if worse:
            lines.append(f"{standing.strategy} is better than {', '.join(worse)}")
    known = {frozenset(pair) for pair in better}
    open_pairs = [
        f"{a.strategy} and {b.strategy}"
        for a, b in combinations(order, 2)
        if frozenset((a.strategy, b.strategy)) not in known
    ]
    rest = f" Not told apart, and so not ranked: {'; '.join(open_pairs)}." if open_pairs else ""
    return f"By {by}: {'; '.join(lines)} ({tests}).{rest}"


def _result(standing: Standing) -> str:
    pooled = standing.pooled()
    return f"{_percent(standing)} of {pooled.episodes if pooled else 0} episodes succeeded"


def _percent(standing: Standing) -> str:
    return f"{100 * standing.rate:.0f} %"


def _cost(standing: Standing) -> str:
    speed = f"{standing.samples_per_s:.3g} samples/s"
    return speed if standing.peak is None else f"{standing.peak / 1e6:,.0f} MB at {speed}"


# ------------------------------------------------------------------------------------------------ correlation


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties.

    None for fewer than 3 pairs, or if one side is constant.
    """
    if len(pairs) < 3:
        return None
    x, y = _ranks([a for a, _ in pairs]), _ranks([b for _, b in pairs])
    middle = (len(pairs) + 1) / 2
    sxy = sum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True))
    sxx, syy = (sum((a - middle) ** 2 for a in side) for side in (x, y))
    return sxy / math.sqrt(sxx * syy) if sxx and syy else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]


def loss_and_success(records: Sequence[ArmRecord]) -> list[tuple[float, float]]:
    """Return (last validation loss, success rate) of every arm that has both."""
    points = []
    for record in records:
        score = record.figures.score(AFTER) if record.figures else None
        loss = record.figures.last() if record.figures else None
        if score is not None and score.rate is not None and loss is not None:
            points.append((loss, score.rate))
    return points
