"""Extend a run: more steps for a run that exists, at its final learning rate or with a new schedule.

AdamW's states, EMA and sample order go on as if the run had been this long from the start. Its schedule keeps
the length that it had (`optim.schedule_steps`), unless `optim.schedule_from` lets another one begin.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vlafit.errors import TrainingError
from vlafit.recipe import Recipe
from vlafit.train.optim import schedule
from vlafit.tuning import load_strategy

FINAL = ("after", "wrong_instruction")  # evaluations of a run's last checkpoint


def continued(saved: Recipe, now: Recipe, out: Path) -> Recipe:
    """Return the recipe with which the run of the recipe `saved` goes on, when the user asks for `now`.

    The same run keeps its schedule, whether `now` repeats it or not. Raises TrainingError for an extension
    whose result would depend on when it was asked for.
    """
    before, optim = saved.optim, now.optim
    restarts = optim.schedule_from not in (0, before.schedule_from)
    if now.train.steps == saved.train.steps:
        same = not restarts and optim.schedule_steps in (0, before.schedule_steps)
        return _scheduled(now, before.schedule_from, before.schedule_steps) if same else now
    if now.train.steps < saved.train.steps:
        return now
    for problem in _problems(saved, now):
        raise TrainingError(f"{out}: cannot be extended to {now.train.steps} steps: {problem}")
    if restarts:
        return now
    length = before.schedule_steps or saved.train.steps - before.schedule_from
    return _scheduled(now, before.schedule_from, length)


def as_before(saved: Recipe, now: Recipe) -> Recipe:
    """Return an extended recipe without what an extension may change, to compare it with the one `saved`."""
    if now.train.steps <= saved.train.steps:
        return now
    same = _scheduled(now, saved.optim.schedule_from, saved.optim.schedule_steps)
    return replace(same, train=replace(now.train, steps=saved.train.steps))


def notice(saved: Recipe, now: Recipe) -> str:
    """Return what a reader of an extended run's results must know; empty if it is not extended."""
    if now.train.steps <= saved.train.steps:
        return ""
    began = now.optim.schedule_from
    rate = (
        f"a new schedule of the learning rate begins at step {began}"
        if began != saved.optim.schedule_from
        else _continued(saved, now)
    )
    return f"train.steps was {saved.train.steps}, is now {now.train.steps}: the run was extended; {rate}"


def _continued(saved: Recipe, now: Recipe) -> str:
    """Return what the learning rate does in the further steps of a schedule that goes on."""
    optim = now.optim
    first, last = (schedule(s, now.train.steps, optim) for s in (saved.train.steps, now.train.steps - 1))
    if first == last == optim.final_lr:
        return f"the learning rate stays at its final value, {optim.final_lr * optim.lr:g}"
    warm = optim.schedule_from + optim.warmup_steps
    within = f", in the warm-up that ends at step {warm}," if saved.train.steps < warm else ""
    return (
        f"the learning rate goes on from {first * optim.lr:.3g} at step {saved.train.steps}{within} to "
        f"{last * optim.lr:.3g} at the last step"
    )


def keep_evaluations(out: Path, steps: int) -> None:
    """Rename the evaluations of the last checkpoint so far, of `steps` steps: another will be the last."""
    for name in FINAL:
        if (out / "eval" / name).is_dir():
            os.rename(out / "eval" / name, out / "eval" / f"{name}_step_{steps:06d}")


def _scheduled(recipe: Recipe, began: int, length: int) -> Recipe:
    return replace(recipe, optim=replace(recipe.optim, schedule_from=began, schedule_steps=length))


def _problems(saved: Recipe, now: Recipe) -> Iterator[str]:
    began = now.optim.schedule_from
    if saved.train.max_seconds or now.train.max_seconds:
        yield "its length is train.max_seconds; fine-tune its last checkpoint in a new run instead"
    if began not in (0, saved.optim.schedule_from) and not saved.train.steps <= began < now.train.steps:
        yield (
            f"optim.schedule_from = {began}, where a new schedule begins, must be from"
            f" {saved.train.steps} (the end of the run so far) to {now.train.steps - 1}"
        )
    strategy = load_strategy(now.strategy)
    for stage in strategy.stages:
        if stage.begin is not None and stage.begin.fraction is not None:
            yield f"a stage of strategy {now.strategy!r} begins at {stage.begin}, now another step"
    if strategy.lowers_ranks:
        yield f"AdaLoRA in strategy {now.strategy!r} lowered its ranks for a run of the old length"
