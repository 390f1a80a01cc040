"""What a comparison says, as plain values: compare.json, and the sentences that its page shows, too."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlafit.compare import arms
from vlafit.compare.identity import digest
from vlafit.compare.judge import (
    AFTER,
    WRONG,
    Pooled,
    Standing,
    Verdict,
    dispersion,
    interval,
    judge,
    loss_and_success,
    mean,
    rank_correlation,
)
from vlafit.compare.record import HELD_OUT, Record
from vlafit.compare.run import Comparison
from vlafit.score import errors_notice, overall, wilson

FORMAT = 1
SAME_STARTS = (
    "All seeds play the same starts, so episodes pooled over seeds are not independent: the intervals hold "
    "for these starts, and more seeds add no new ones (more trials in the protocol do)."
)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return compare.json: every number of the page, every arm whole."""
    verdict = verdict_of(comparison)
    why = did_not_finish(comparison)
    pairs = loss_and_success(comparison.records)
    return {
        "format": FORMAT,
        "name": comparison.recipe.name,
        "purpose": comparison.recipe.purpose,
        "identity": {"sha256": digest(comparison.identity), **comparison.identity},
        "recipe": asdict(comparison.recipe),
        "seeds": list(comparison.options.seeds),
        "lr_grid": list(comparison.options.lr_grid),
        "verdict": asdict(verdict),
        "strategies": [
            {**strategy_json(one), "did_not_finish": why.get(one.strategy)} for one in comparison.standings
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


def strategy_json(one: Standing) -> dict[str, Any]:
    """Return what a strategy came to, over its seeds."""
    figures = one.figures
    sets = dict.fromkeys(name for f in figures for name in f.validation)
    choice = one.choice
    tried = choice.losses if choice else {}
    return {
        "strategy": one.strategy,
        "lr": one.lr,
        "lr_tried": [{"lr": lr, "last_loss": loss} for lr, loss in tried.items()],
        "lr_at_edge": choice.edge if choice else "",
        "seeds_finished": [record.seed for record in one.records if record.finished],
        "success": {
            name: {
                "overall": _pooled_json(score),
                "tasks": {task: _pooled_json(found) for task, found in one.tasks(name).items()},
                "seeds": {str(seed): found.to_json() for seed, found in one.scores(name).items()},
                "dispersion": dispersion(list(one.scores(name).values())),
                "interval": list(interval(list(one.scores(name).values()))),
            }
            for name in (AFTER, WRONG)
            if (score := one.pooled(name)) is not None
        },
        "validation": {name: _set_json(one, name) for name in sets},
        "forgetting": {name: mean([f.forgotten(name) for f in figures]) for name in sets if name != HELD_OUT},
        "parameters": max((f.parameters for f in figures), default=None),
        "trainable": max((f.trainable for f in figures), default=None),
        "checkpoint_mb": _mb(mean([f.checkpoint_bytes for f in figures])),
        "memory": _memory_json(one),
        "samples_per_s": mean([f.samples_per_s for f in figures]),
        "train_seconds": mean([f.train_seconds for f in figures]),
        "seconds_to_best": mean([best.seconds for f in figures if (best := f.best()) is not None]),
        "merge_error": max((f.merge_error for f in figures if f.merge_error is not None), default=None),
    }


def _pooled_json(score: Pooled) -> dict[str, Any]:
    """Return a score of all seeds; `wilson` is the interval of seeds that differ by chance alone."""
    return {**score.to_json(), "wilson": list(wilson(score.successes, score.episodes))}


def _set_json(one: Standing, name: str) -> dict[str, Any]:
    seeds = {}
    for record in one.records:
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


def _memory_json(one: Standing) -> dict[str, Any] | None:
    """Return the peak in MB, and the parts of the seed that had it."""
    found = max((f.memory for f in one.figures if f.memory), key=lambda m: m.peak, default=None)
    if found is None:
        return None
    return {
        "peak_mb": _mb(found.peak),
        "parts_mb": {name: _mb(size) for name, size in found.parts.items()},
        "rss_mb": _mb(found.rss),
        "allocated_mb": _mb(found.allocated),
        "reserved_mb": _mb(found.reserved),
        "exact": found.exact,
    }


def _mb(size: float | None) -> float | None:
    return None if size is None else round(size / 1e6, 3)


# ------------------------------------------------------------------------------------------------- sentences


def notes(comparison: Comparison) -> Iterator[str]:
    """Yield what a reader must know of the learning rates, and what loss says about success."""
    grid = comparison.options.lr_grid
    if len(grid) < 2:
        yield (
            "Every strategy was trained at one and the same learning rate. That is no fair ranking: what "
            "suits full fine-tuning is mostly several times too low for low-rank adapters. Give --lr-grid."
        )
    edges: dict[tuple[float, str], list[str]] = {}
    for one in comparison.standings:
        if one.choice and one.choice.edge:
            edges.setdefault((one.choice.lr, one.choice.edge), []).append(one.strategy)
    for (lr, edge), names in edges.items():
        places = "their places" if len(names) > 1 else "its place"
        yield (
            f"{', '.join(names)}: the best learning rate, {arms.rate(lr)}, is the {edge} of the grid; a "
            f"better one may lie beyond, so widen --lr-grid before believing {places}."
        )
    pairs = loss_and_success(comparison.records)
    correlation = rank_correlation(pairs)
    if correlation is not None:
        yield (
            f"Rank correlation of last validation loss and success over {len(pairs)} arms: "
            f"{correlation:+.2f} (-1: the lower the loss, the higher the success; 0: loss says "
            "nothing about success)."
        )


def caveats(comparison: Comparison) -> Iterator[str]:
    """Yield what stands between a reader and the numbers."""
    records = comparison.records
    for record in records:
        if record.error:
            yield f"{record.name} broke and is left out: {record.reason} (log: {_log(comparison, record)})"
    for one in comparison.standings:
        seeds = {record.seed for record in one.records if record.finished}
        if one.records and seeds != set(comparison.options.seeds):
            yield f"{one.strategy}: {len(seeds)} of {len(comparison.options.seeds)} seeds have finished."
        for name in (AFTER, WRONG):
            notice = errors_notice(overall({str(k): v for k, v in one.scores(name).items()}))
            if notice:
                yield f"{one.strategy}, {name}: {notice}"
    if any(len(one.scores(name)) > 1 for one in comparison.standings for name in (AFTER, WRONG)):
        yield SAME_STARTS
    if comparison.options.jobs > 1:
        yield (
            f"{comparison.options.jobs} arms ran at once on one machine: times and speeds are those of a "
            "shared machine."
        )
    for what, values in _machines(records).items():
        if len(values) > 1:
            yield f"The arms did not all have the same {what}: {', '.join(sorted(values))}."
    if any(r.figures and r.figures.memory and not r.figures.memory.exact for r in records):
        yield "This system tells the peak memory of a process's whole life alone, loading included."
    yield from dict.fromkeys(text for r in records if r.figures for text in r.figures.caveats)


def _machines(records: Sequence[Record]) -> dict[str, set[str]]:
    figures = [record.figures for record in records if record.figures]
    return {
        "device": {one.device for one in figures},
        "number of threads": {str(one.threads) for one in figures},
        "commit": {str(one.commit) for one in figures},
        "versions": {json.dumps(one.versions, sort_keys=True) for one in figures},
    }


def missing(comparison: Comparison) -> Iterator[str]:
    """Yield what was asked for and is not there."""
    for name in dict.fromkeys(comparison.missing):
        yield f"{name} has not ended; the same command goes on with it."
    if not arms.asks_for_rollouts(comparison.recipe):
        yield "The recipe asks for no rollouts, so no success was measured: loss is not success."
    if not comparison.recipe.data.validation_sets:
        yield "data.validation_sets names nothing, so forgetting was not measured."
    for one in comparison.standings:
        unknown = [str(r.seed) for r in one.records if r.figures and r.figures.merge_error is None]
        if one.adapts and unknown:
            seeds = f"seed{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
            yield f"merge error was not recorded for {one.strategy} ({seeds})."


def verdict_of(comparison: Comparison) -> Verdict:
    """Return the verdict of a comparison, whose notes say which strategies are not in it."""
    verdict, why = judge(comparison.standings), did_not_finish(comparison)
    if not verdict.by:
        return verdict
    left_out = []
    for one in comparison.standings:
        if one.pooled() is None if verdict.by == "success" else not one.losses():
            said = f"did not finish: {why[one.strategy]}" if one.strategy in why else "has no results yet"
            left_out.append(f"Left out of the ranking: {one.strategy}, which {said}")
    return replace(verdict, notes=(*verdict.notes, *left_out))


def did_not_finish(comparison: Comparison) -> dict[str, str]:
    """Return why, for each strategy of which no arm at its learning rate finished and one broke."""
    found: dict[str, str] = {}
    for one in comparison.standings:
        broken = [r for r in comparison.broken if r.strategy == one.strategy]
        if broken and not one.figures:
            found[one.strategy] = broken[0].reason
    return found


def _log(comparison: Comparison, record: Record) -> Path:
    return comparison.log(record.name).relative_to(comparison.folder)
