"""Results of one strategy over its seeds, and the learning rate that it takes from a grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlafit.compare.arm_record import AFTER, ArmRecord, Figures
from vlafit.compare.pooled_score import Pooled, interval, pool
from vlafit.score import Score

SAME_COST = 1.05  # peaks of memory within 5 % count as equal; our choice, not a measurement


@dataclass(frozen=True)
class Choice:
    """The learning rate that a strategy takes from those that were tried."""

    lr: float
    losses: Mapping[float, float | None]
    """Mean of the last validation loss over the seeds that tried it; None if one of them failed."""
    edge: str = ""
    """"lowest" or "highest" if the best is at an end of the grid: a better one may be outside."""


def choose_lr(tried: Mapping[float, Sequence[ArmRecord]]) -> Choice | None:
    """Return the learning rate with the lowest last validation loss; None if all failed.

    The last loss, not the lowest, because the last checkpoint is what is evaluated.
    """
    losses: dict[float, float | None] = {}
    for lr, records in sorted(tried.items()):
        last = [record.figures.last() if record.figures else None for record in records]
        known = [loss for loss in last if loss is not None]
        losses[lr] = sum(known) / len(known) if last and len(known) == len(last) else None
    finished = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not finished:
        return None
    best = min(finished, key=lambda lr: finished[lr])
    ends = (min(losses), max(losses))
    edge = "" if len(losses) < 2 or best not in ends else ("lowest" if best == ends[0] else "highest")
    return Choice(best, losses, edge)


@dataclass(frozen=True)
class Standing:
    """A strategy at its learning rate, over its seeds."""

    strategy: str
    lr: float | None
    """None: every learning rate that was tried failed, or the search was stopped."""
    records: tuple[ArmRecord, ...]
    choice: Choice | None = None
    adapts: bool = False
    """Whether the strategy has adapters, so that merging them has an error."""

    @property
    def figures(self) -> list[Figures]:
        """Figures of the seeds that finished."""
        return [record.figures for record in self.records if record.figures]

    def scores(self, evaluation: str = AFTER) -> dict[int, Score]:
        """Return the score of each evaluated seed."""
        by_seed = {r.seed: r.figures.score(evaluation) for r in self.records if r.figures}
        return {seed: score for seed, score in by_seed.items() if score is not None}

    def pooled(self, evaluation: str = AFTER) -> Pooled | None:
        """Return the score over all episodes of all seeds; None without any episode."""
        score = pool(list(self.scores(evaluation).values()))
        return score if score.episodes else None

    def tasks(self, evaluation: str = AFTER) -> dict[str, Pooled]:
        """Return each task's score over all seeds."""
        by_task: dict[str, list[Score]] = {}
        for figures in self.figures:
            for task, score in figures.success.get(evaluation, {}).items():
                by_task.setdefault(task, []).append(score)
        return {task: pool(scores) for task, scores in by_task.items()}

    @property
    def rate(self) -> float:
        """Success rate over all episodes of all seeds; 0 without any."""
        pooled = self.pooled()
        return (pooled.rate if pooled else None) or 0.0

    @property
    def seeds_judged(self) -> int:
        """Number of seeds with an episode that ended without an error."""
        return sum(score.episodes > 0 for score in self.scores().values())

    @property
    def outcomes(self) -> dict[int, dict[str, bool | None]]:
        """Start -> outcome for each evaluated seed; empty for records without outcomes by start.

        Starts are in the order of their environment seeds, tasks alternating.
        """
        by_seed = {r.seed: r.figures.outcomes.get(AFTER, {}) for r in self.records if r.figures}
        return {seed: starts_of(tasks) for seed, tasks in by_seed.items() if tasks}

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the success rate over all seeds."""
        return interval(list(self.scores().values()))

    def losses(self) -> dict[int, float]:
        """Return the last validation loss of each seed."""
        by_seed = {r.seed: r.figures.last() for r in self.records if r.figures}
        return {seed: loss for seed, loss in by_seed.items() if loss is not None}

    @property
    def peak(self) -> float | None:
        """Peak memory in bytes, the highest of its seeds."""
        return max((figures.memory.peak for figures in self.figures if figures.memory), default=None)

    @property
    def samples_per_s(self) -> float:
        """Training speed, the mean of its seeds."""
        return mean([figures.samples_per_s for figures in self.figures]) or 0.0


def starts_of(tasks: Mapping[str, Mapping[str, bool | None]]) -> dict[str, bool | None]:
    """Return the outcomes of all tasks by start ("TASK SEED")."""
    starts = [(int(seed), task) for task, outcomes in tasks.items() for seed in outcomes]
    return {f"{task} {seed}": tasks[task][str(seed)] for seed, task in sorted(starts, key=lambda s: s[0])}


def cheapest(standings: Sequence[Standing]) -> Standing:
    """Return the strategy with the lowest peak memory; of those within 5 % of it, the fastest to train."""
    known = [s for s in standings if s.peak is not None]
    if not known:
        return max(standings, key=lambda s: s.samples_per_s)
    lowest = min(s.peak or 0 for s in known)
    return max((s for s in known if (s.peak or 0) <= SAME_COST * lowest), key=lambda s: s.samples_per_s)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
