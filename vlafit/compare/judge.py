"""What recorded figures allow to say: which learning rate, which order, which recommendation. Pure functions.

Two strategies whose intervals overlap are not ranked, nor is one of which fewer than two seeds have finished:
how much training runs vary is then unknown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from vlafit.compare.arm_record import AFTER, WRONG, ArmRecord, Figures
from vlafit.compare.pooled_score import Pooled, dispersion, interval, pool
from vlafit.score import Z_95, Score

SAME_COST = 1.05  # peaks of memory within 5 % count as equal; our choice, not a measurement
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more, a bit too wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


# --------------------------------------------------------------------------------------------- learning rate


@dataclass(frozen=True)
class Choice:
    """Which learning rate a strategy takes, of those that were tried."""

    lr: float
    losses: Mapping[float, float | None]
    """Mean of the last validation loss over the seeds that tried it; None where one of them broke."""
    edge: str = ""
    """"lowest" or "highest" where the best is that of the grid: a better one may lie beyond."""


def choose_lr(tried: Mapping[float, Sequence[ArmRecord]]) -> Choice | None:
    """Return the learning rate of the lowest last validation loss; None where every one broke.

    The last loss and not the lowest: the last checkpoint is what is rolled out.
    """
    losses: dict[float, float | None] = {}
    for lr, records in sorted(tried.items()):
        found = [record.figures.last() if record.figures else None for record in records]
        whole = [loss for loss in found if loss is not None]
        losses[lr] = sum(whole) / len(whole) if found and len(whole) == len(found) else None
    known = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not known:
        return None
    best = min(known, key=lambda lr: known[lr])
    ends = (min(losses), max(losses))
    edge = "" if len(losses) < 2 or best not in ends else ("lowest" if best == ends[0] else "highest")
    return Choice(best, losses, edge)


# ------------------------------------------------------------------------------------------------- standings


@dataclass(frozen=True)
class Standing:
    """A strategy at its learning rate, over its seeds."""

    strategy: str
    lr: float | None
    """None: every learning rate that was tried broke, or the trying was stopped."""
    records: tuple[ArmRecord, ...]
    choice: Choice | None = None
    adapts: bool = False
    """Whether the strategy has adapters, so that merging them has an error."""

    @property
    def figures(self) -> list[Figures]:
        """Figures of the seeds that finished."""
        return [record.figures for record in self.records if record.figures]

    def scores(self, evaluation: str = AFTER) -> dict[int, Score]:
        """Return the score of each seed that was judged."""
        found = {r.seed: r.figures.score(evaluation) for r in self.records if r.figures}
        return {seed: score for seed, score in found.items() if score is not None}

    def pooled(self, evaluation: str = AFTER) -> Pooled | None:
        """Return all episodes of all seeds together; None where nothing was judged."""
        score = pool(list(self.scores(evaluation).values()))
        return score if score.episodes else None

    def tasks(self, evaluation: str = AFTER) -> dict[str, Pooled]:
        """Return each task's episodes of all seeds together."""
        found: dict[str, list[Score]] = {}
        for one in self.figures:
            for task, score in one.success.get(evaluation, {}).items():
                found.setdefault(task, []).append(score)
        return {task: pool(seeds) for task, seeds in found.items()}

    @property
    def seeds_judged(self) -> int:
        """Seeds of which an episode was judged."""
        return sum(score.episodes > 0 for score in self.scores().values())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of success by which strategies are ranked."""
        return interval(list(self.scores().values()))

    def losses(self) -> dict[int, float]:
        """Return the last validation loss of each seed."""
        found = {r.seed: r.figures.last() for r in self.records if r.figures}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def peak(self) -> float | None:
        """Peak memory in bytes, the highest of its seeds."""
        return max((one.memory.peak for one in self.figures if one.memory), default=None)

    @property
    def samples_per_s(self) -> float:
        """Training speed, the mean of its seeds."""
        return mean([one.samples_per_s for one in self.figures]) or 0.0


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------------------ order


@dataclass(frozen=True)
class Verdict:
    """What may be said of all strategies together."""

    by: str
    """What they were judged by: "success", "loss", or "" where there is nothing to judge."""
    ranked: bool
    """Whether any two can be told apart."""
    better: tuple[tuple[str, str], ...] = ()
    """Pairs of which the first is better than the second."""
    leaders: tuple[str, ...] = ()
    """The best and whatever cannot be told apart from it, the best first."""
    sentence: str = ""
    recommended: str = ""
    reason: str = ""
    notes: tuple[str, ...] = field(default=())


def judge(standings: Sequence[Standing]) -> Verdict:
    """Order strategies as far as intervals allow; recommend the cheapest of those that may be the best."""
    played = [s for s in standings if s.pooled() is not None]
    if len(played) >= 1:
        return _by_success(played)
    lost = [s for s in standings if s.losses()]
    return (
        _by_loss(lost)
        if lost
        else Verdict("", False, sentence="No arm has finished: there is nothing to judge.")
    )


def _by_success(standings: Sequence[Standing]) -> Verdict:
    if all(_rate(s) == 0 for s in standings):
        said = (
            "No strategy succeeded in a single episode: there is nothing to rank, and nothing to recommend."
        )
        return Verdict("success", False, leaders=tuple(s.strategy for s in standings), sentence=said)
    order = sorted((s for s in standings if s.seeds_judged > 1), key=lambda s: -_rate(s))
    alone = _too_few_seeds(order, standings)
    if len(order) < 2:
        return _nothing_to_compare("success", standings, alone)
    better = tuple(
        (a.strategy, b.strategy) for a, b in combinations(order, 2) if a.interval[0] > b.interval[1]
    )
    best = order[0]
    leaders = [s for s in order if (best.strategy, s.strategy) not in better]
    names = tuple(s.strategy for s in leaders)
    sentence = _sentence(order, better, "success", "95 % intervals of success")
    chosen = cheapest(leaders)
    reason = f"{_percent(chosen)} of {_pooled(chosen).episodes} episodes succeeded"
    if len(leaders) == 1:
        reason += ", and no other strategy's interval reaches its own"
    else:
        others = [s for s in leaders if s is not chosen]
        than = ", ".join(f"{s.strategy} {_cost(s)}" for s in others)
        reason += f"; of the {len(leaders)} that cannot be told apart from the best it is the cheapest: "
        reason += f"{_cost(chosen)} ({than})"
    notes = [alone] if alone else []
    gap = _rate(best) - _rate(chosen)
    if gap > 0:
        needed = episodes_needed(_rate(best), _rate(chosen))
        notes.append(
            f"{best.strategy} has the higher rate ({_percent(best)} against {_percent(chosen)}); if that "
            f"difference is real, about {needed} episodes of each would show it: of new starts (more trials "
            "in the protocol), not of more seeds."
        )
    return Verdict(
        "success", bool(better), better, names, sentence, chosen.strategy, reason + ".", tuple(notes)
    )


def _nothing_to_compare(by: str, standings: Sequence[Standing], alone: str) -> Verdict:
    """Return the verdict on strategies of which fewer than two can be ranked."""
    if len(standings) == 1:
        alone = f"Only {standings[0].strategy} has results: there is nothing to compare it with."
    return Verdict(by, False, leaders=tuple(s.strategy for s in standings), sentence=alone)


def _too_few_seeds(order: Sequence[Standing], standings: Sequence[Standing]) -> str:
    """Return why strategies that are not in `order` are not ranked: too few of their seeds have finished."""
    too_few = [s for s in standings if s not in order]
    if not too_few:
        return ""
    names, one = ", ".join(s.strategy for s in too_few), len(too_few) == 1
    head = "Neither ranked nor recommended" if len(order) > 1 else "No ranking and no recommendation"
    return (
        f"{head}: {names} {'has' if one else 'have'} one finished seed{'' if one else ' each'}, and with one "
        "seed the variation between training runs is unknown; give --seeds 2 or more."
    )


def _by_loss(standings: Sequence[Standing]) -> Verdict:
    enough = [s for s in standings if len(s.losses()) > 1]
    order = sorted(enough, key=lambda s: mean(list(s.losses().values())) or 0.0)
    alone = _too_few_seeds(order, standings)
    if len(order) < 2:
        return _nothing_to_compare("loss", standings, alone)
    better = tuple(
        (a.strategy, b.strategy) for a, b in combinations(order, 2) if lower(a.losses(), b.losses())
    )
    leaders = [s for s in order if (order[0].strategy, s.strategy) not in better]
    sentence = _sentence(order, better, "loss", "paired 95 % intervals of the last validation loss")
    names = tuple(s.strategy for s in leaders)
    chosen = cheapest(leaders)
    reason = (
        f"nothing was rolled out, so this goes by validation loss alone, which is not success; among the "
        f"{len(leaders)} that may be the best it is the cheapest: {_cost(chosen)}."
    )
    notes = (alone,) if alone else ()
    return Verdict("loss", bool(better), better, names, sentence, chosen.strategy, reason, notes)


def lower(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether `one` is surely below `other`: the paired 95 % interval over shared seeds excludes zero."""
    seeds = sorted(set(one) & set(other))
    differences = [other[seed] - one[seed] for seed in seeds]
    n = len(differences)
    if n < 2:
        return False
    middle = sum(differences) / n
    spread = math.sqrt(sum((d - middle) ** 2 for d in differences) / (n - 1))
    return middle - T_95[min(n - 2, len(T_95) - 1)] * spread / math.sqrt(n) > 0


def _sentence(order: Sequence[Standing], better: Sequence[tuple[str, str]], by: str, what: str) -> str:
    if not better:
        return f"No ranking: the {what} of all {len(order)} strategies overlap, so they cannot be told apart."
    lines = []
    for one in order:
        worse = [b for a, b in better if a == one.strategy]
        if worse:
            lines.append(f"{one.strategy} is better than {', '.join(worse)}")
    open_pairs = [
        f"{a.strategy} and {b.strategy}"
        for a, b in combinations(order, 2)
        if (a.strategy, b.strategy) not in better
    ]
    rest = f" Not told apart, and so not ranked: {'; '.join(open_pairs)}." if open_pairs else ""
    return f"By {by}: {'; '.join(lines)}.{rest}"


def cheapest(standings: Sequence[Standing]) -> Standing:
    """Return the one of the least peak memory; of those within 5 % of it, the fastest to train."""
    known = [s for s in standings if s.peak is not None]
    if not known:
        return max(standings, key=lambda s: s.samples_per_s)
    least = min(s.peak or 0 for s in known)
    return max((s for s in known if (s.peak or 0) <= SAME_COST * least), key=lambda s: s.samples_per_s)


def episodes_needed(one: float, other: float) -> int:
    """Return about how many episodes of each would make the 95 % intervals of two rates part."""
    sides = math.sqrt(one * (1 - one)) + math.sqrt(other * (1 - other))
    return max(1, math.ceil((Z_95 * sides / (one - other)) ** 2))


def _rate(standing: Standing) -> float:
    return _pooled(standing).rate or 0.0


def _pooled(standing: Standing) -> Score:
    return standing.pooled() or Score(0, 0)


def _percent(standing: Standing) -> str:
    return f"{100 * _rate(standing):.0f} %"


def _cost(standing: Standing) -> str:
    speed = f"{standing.samples_per_s:.3g} samples/s"
    return speed if standing.peak is None else f"{standing.peak / 1e6:,.0f} MB at {speed}"


# ------------------------------------------------------------------------------------------------ correlation


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation, ties at their mean rank.

    None below 3 pairs, or where one side is constant.
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
    found = []
    for record in records:
        score = record.figures.score(AFTER) if record.figures else None
        loss = record.figures.last() if record.figures else None
        if score is not None and score.rate is not None and loss is not None:
            found.append((loss, score.rate))
    return found


__all__ = [
    "AFTER",
    "WRONG",
    "Choice",
    "Pooled",
    "Standing",
    "Verdict",
    "cheapest",
    "choose_lr",
    "dispersion",
    "episodes_needed",
    "interval",
    "judge",
    "loss_and_success",
    "lower",
    "mean",
    "rank_correlation",
]
