"""Summarise a comparison: compare.json, and the notes and caveats shown on the page and the console."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlafit.compare import arms
from vlafit.compare.arm_record import AFTER, HELD_OUT, WRONG, ArmRecord
from vlafit.compare.comparison import Comparison
from vlafit.compare.identity import digest
from vlafit.compare.judge import Verdict, judge, loss_and_success, rank_correlation
from vlafit.compare.pooled_score import Pooled, dispersion, interval
from vlafit.compare.standing import Standing, mean
from vlafit.score import errors_notice, overall, wilson

FORMAT = 1
SAME_STARTS = (
    "All strategies and seeds play the same starts, so their episodes are not independent. Strategies are "
    "therefore compared by their differences at each start; the intervals of single rates pool all episodes "
    "and say nothing about differences. More seeds add no new starts; more trials in the protocol do."
)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return compare.json: every number of the page, and the full record of every arm."""
    verdict = verdict_of(comparison)
    failures = did_not_finish(comparison)
    pairs = loss_and_success(comparison.records)
    return {
        "format": FORMAT,
        "name": comparison.recipe.name,
        "purpose": comparison.recipe.purpose,
        "identity": {"sha256": digest(comparison.identity), **comparison.identity},
        "recipe": asdict(comparison.recipe),
        "seeds": list(comparison.options.seeds),
        "lr_grid": list(comparison.options.lr_grid),
        "jobs": comparison.options.jobs,
        "verdict": asdict(verdict),
        "strategies": [
            {**strategy_json(standing), "did_not_finish": failures.get(standing.strategy)}
            for standing in comparison.standings
        ],
        "loss_against_success": {
            "spearman": rank_correlation(pairs),
            "arms": len(pairs),
            "pairs": [{"loss": loss, "success": rate} for loss, rate in pairs],
        },
        "notes": list(notes(comparison)),
        "caveats": list(caveats(comparison)),
        "missing": list(missing(comparison)),
        "command": comparison.command,
        "arms": [asdict(record) for record in comparison.records],
    }


def strategy_json(standing: Standing) -> dict[str, Any]:
    """Return a strategy's results over its seeds."""
    figures = standing.figures
    sets = dict.fromkeys(name for f in figures for name in f.validation)
    choice = standing.choice
    tried = choice.losses if choice else {}
    return {
        "strategy": standing.strategy,
        "lr": standing.lr,
        "lr_tried": [{"lr": lr, "last_loss": loss} for lr, loss in tried.items()],
        "lr_at_edge": choice.edge if choice else "",
        "seeds_finished": [record.seed for record in standing.records if record.finished],
        "success": {
            name: {
                "overall": _pooled_json(total),
                "tasks": {task: _pooled_json(score) for task, score in standing.tasks(name).items()},
                "seeds": {str(seed): score.to_json() for seed, score in standing.scores(name).items()},
                "dispersion": dispersion(list(standing.scores(name).values())),
                "interval": list(interval(list(standing.scores(name).values()))),
            }
            for name in (AFTER, WRONG)
            if (total := standing.pooled(name)) is not None
        },
        "validation": {name: _set_json(standing, name) for name in sets},
        "forgetting": {name: mean([f.forgotten(name) for f in figures]) for name in sets if name != HELD_OUT},
        "parameters": max((f.parameters for f in figures), default=None),
        "trainable": max((f.trainable for f in figures), default=None),
        "checkpoint_mb": _mb(mean([f.checkpoint_bytes for f in figures])),
        "memory": _memory_json(standing),
        "samples_per_s": mean([f.samples_per_s for f in figures]),
        "train_seconds": mean([f.train_seconds for f in figures]),
        "seconds_to_best": mean([best.seconds for f in figures if (best := f.best()) is not None]),
        "merge_error": max((f.merge_error for f in figures if f.merge_error is not None), default=None),
    }


def _pooled_json(score: Pooled) -> dict[str, Any]:
    """Return a score over all seeds; `wilson` is the interval if seeds differ only by chance."""
    return {**score.to_json(), "wilson": list(wilson(score.successes, score.episodes))}


def _set_json(standing: Standing, name: str) -> dict[str, Any]:
    seeds = {}
    for record in standing.records:
        points = record.figures.validation.get(name, ()) if record.figures else ()
        best = record.figures.best(name) if record.figures else None
        if points and best:
            seeds[str(record.seed)] = {
                "first": points[0].loss,
                "best": best.loss,
                "best_step": best.step,
                "best_seconds": best.seconds,
                "last": points[-1].loss,
                "last_action_error": points[-1].action_error,
                "curve": [asdict(point) for point in points],
            }
    keys = ("first", "best", "last", "last_action_error")
    return {**{key: mean([seed[key] for seed in seeds.values()]) for key in keys}, "seeds": seeds}


def _memory_json(standing: Standing) -> dict[str, Any] | None:
    """Return the highest peak of all seeds in MB, with that seed's breakdown."""
    memory = max((f.memory for f in standing.figures if f.memory), key=lambda m: m.peak, default=None)
    if memory is None:
        return None
    return {
        "peak_mb": _mb(memory.peak),
        "parts_mb": {name: _mb(size) for name, size in memory.parts.items()},
        "rss_mb": _mb(memory.rss),
        "allocated_mb": _mb(memory.allocated),
        "reserved_mb": _mb(memory.reserved),
        "exact": memory.exact,
    }


def _mb(size: float | None) -> float | None:
    return None if size is None else round(size / 1e6, 3)


# ------------------------------------------------------------------------------------------------- sentences


def notes(comparison: Comparison) -> Iterator[str]:
    """Yield notes about the learning rates, and about the correlation of loss and success."""
    grid = comparison.options.lr_grid
    if len(grid) < 2:
        yield (
            "All strategies were trained at the same learning rate, which is not a fair ranking: a good "
            "rate for full fine-tuning is usually several times too low for low-rank adapters. Use --lr-grid."
        )
    edges: dict[tuple[float, str], list[str]] = {}
    for standing in comparison.standings:
        if standing.choice and standing.choice.edge:
            edges.setdefault((standing.choice.lr, standing.choice.edge), []).append(standing.strategy)
    for (lr, edge), names in edges.items():
        yield (
            f"{', '.join(names)}: the best learning rate, {arms.rate(lr)}, is the {edge} of the grid; a "
            "better one may be outside, so widen --lr-grid before relying on the ranking."
        )
    pairs = loss_and_success(comparison.records)
    correlation = rank_correlation(pairs)
    if correlation is not None:
        yield (
            f"Rank correlation of last validation loss and success over {len(pairs)} arms: "
            f"{correlation:+.2f} (-1: the lower the loss, the higher the success; 0: loss does not "
            "predict success)."
        )


def caveats(comparison: Comparison) -> Iterator[str]:
    """Yield warnings to read before using the numbers."""
    records = comparison.records
    for record in records:
        if record.error:
            yield f"{record.name} failed and is left out: {record.reason} (log: {_log(comparison, record)})"
    for standing in comparison.standings:
        seeds = {record.seed for record in standing.records if record.finished}
        if standing.records and seeds != set(comparison.options.seeds):
            yield f"{standing.strategy}: {len(seeds)} of {len(comparison.options.seeds)} seeds have finished."
        for name in (AFTER, WRONG):
            notice = errors_notice(overall({str(k): v for k, v in standing.scores(name).items()}))
            if notice:
                yield f"{standing.strategy}, {name}: {notice}"
    if any(len(s.scores(name)) > 1 for s in comparison.standings for name in (AFTER, WRONG)):
        yield SAME_STARTS
    if comparison.options.jobs > 1:
        yield (
            f"{comparison.options.jobs} arms ran at once on one machine, so times and speeds are those of a "
            "shared machine."
        )
    for what, values in _machines(records).items():
        if len(values) > 1:
            yield f"The arms differ in {what}: {', '.join(sorted(values))}."
    if any(r.figures and r.figures.memory and not r.figures.memory.exact for r in records):
        yield "Peak memory includes loading: this system reports only the peak of a process's whole lifetime."
    yield from dict.fromkeys(text for r in records if r.figures for text in r.figures.caveats)


def _machines(records: Sequence[ArmRecord]) -> dict[str, set[str]]:
    figures = [record.figures for record in records if record.figures]
    return {
        "device": {f.device for f in figures},
        "number of threads": {str(f.threads) for f in figures},
        "commit": {str(f.commit) for f in figures},
        "versions": {json.dumps(f.versions, sort_keys=True) for f in figures},
    }


def missing(comparison: Comparison) -> Iterator[str]:
    """Yield what was requested but is missing."""
    for name in dict.fromkeys(comparison.missing):
        yield f"{name} has not ended; the same command resumes it."
    if not arms.asks_for_rollouts(comparison.recipe):
        yield "The recipe has no evaluation, so success was not measured: loss is not success."
    if not comparison.recipe.data.validation_sets:
        yield "data.validation_sets is empty, so forgetting was not measured."
    for standing in comparison.standings:
        unknown = [str(r.seed) for r in standing.records if r.figures and r.figures.merge_error is None]
        if standing.adapts and unknown:
            seeds = f"seed{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
            yield f"merge error was not recorded for {standing.strategy} ({seeds})."


def verdict_of(comparison: Comparison) -> Verdict:
    """Return the verdict of a comparison, with notes naming the strategies that are not ranked."""
    verdict, failures = judge(comparison.standings), did_not_finish(comparison)
    if not verdict.by:
        return verdict
    left_out = []
    for standing in comparison.standings:
        name = standing.strategy
        if standing.pooled() is None if verdict.by == "success" else not standing.losses():
            state = f"did not finish: {failures[name]}" if name in failures else "has no results yet"
            left_out.append(f"Left out of the ranking: {name}, which {state}")
    return replace(verdict, notes=(*verdict.notes, *left_out))


def did_not_finish(comparison: Comparison) -> dict[str, str]:
    """Return the reason for each strategy with a failed arm and none finished at its learning rate."""
    reasons: dict[str, str] = {}
    for standing in comparison.standings:
        broken = [record for record in comparison.broken if record.strategy == standing.strategy]
        if broken and not standing.figures:
            reasons[standing.strategy] = broken[0].reason
    return reasons


def _log(comparison: Comparison, record: ArmRecord) -> Path:
    return comparison.log(record.name).relative_to(comparison.folder)
