"""Decide when the stages of a strategy begin in a run, and refuse stages that never could.

Everything here is a function of the run's length, the finished steps and the current stage (`Place`), so
every process, and a resumed run, gets the same answer. A stage changes before the first step of the new one:
the checkpoint of the step before still belongs to the old stage. `train_state.py` changes the stage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlafit.errors import StrategyError
from vlafit.recipe import TrainRecipe
from vlafit.tuning import Moment, Plan, Stage


@dataclass(frozen=True)
class Place:
    """The current stage of a run; saved with every checkpoint."""

    number: int = 0
    """The stage, counted from 0."""
    began: int = 0
    """Optimiser steps that were finished when it began."""
    lowest: float | None = None
    """Lowest validation loss since then."""
    stalled: int = 0
    """Consecutive validations, up to now, that were not lower."""
    spent: float = 0.0
    """Share of the time limit that was used when it began."""

    def validated(self, loss: float) -> "Place":
        """Return the place after one more validation. The first of a stage sets `lowest`."""
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest):
            return replace(self, lowest=loss, stalled=0)
        return replace(self, stalled=self.stalled + 1)


def due(stages: Sequence[Stage], steps: int, step: int, place: Place, spent: float = 0.0) -> int:
    """Return the number of the stage that a run of `steps` is in after `step` of them.

    `spent` is the used share of a time limit: a fraction counts steps or time, whichever is further. The
    stage is never earlier than that of `place`. If several stages are due, the latest wins and the others are
    skipped.
    """
    latest = place.number
    for number in range(place.number + 1, len(stages)):
        begin = stages[number].begin
        assert begin is not None
        at = begin.at_step(steps)
        if at is None:
            assert begin.plateau is not None
            if number == place.number + 1 and place.stalled >= begin.plateau:
                latest = number
        elif step >= at or spent >= (begin.fraction or math.inf):
            latest = number
    return latest


def length(stages: Sequence[Stage], steps: int, place: Place) -> int:
    """Return how many steps the stage of `place` can last, unless a plateau ends it earlier."""
    moments = [stage.begin.at_step(steps) for stage in stages[place.number + 1 :] if stage.begin]
    return min([steps, *(at for at in moments if at is not None)]) - place.began


def depends_on_validation(stages: Sequence[Stage]) -> bool:
    """Tell whether validation decides when a stage begins."""
    return any(stage.begin is not None and stage.begin.plateau is not None for stage in stages)


def title(plan: Plan) -> str:
    """Return the plan's stage for messages: its number, counted from 1, and its name."""
    name = plan.strategy.stages[plan.stage].name
    return f"stage {plan.stage + 1} of {len(plan.strategy.stages)}{f', {name}' if name else ''}"


def require_reachable(plan: Plan, train: TrainRecipe, *, held_out: bool) -> None:
    """Raise StrategyError if a stage of the plan's strategy can never begin in such a run.

    `held_out` tells whether there is anything to validate on. AdaLoRA with sharded weights is refused, too.
    """
    stages, steps, every = plan.strategy.stages, train.steps, train.validate_every
    before, before_at = "", 0
    for number, stage in enumerate(stages):
        where = f"strategy {plan.strategy.name!r}: stage {number + 1}"
        where += f" ({stage.name})" if stage.name else ""
        if train.shards and any(r.adapter and r.adapter.method == "adalora" for r in stage.rules):
            raise StrategyError(
                f"{where}: AdaLoRA needs whole gradients, but train.sharding = {train.sharding!r} shards "
                "them; use train.sharding = 'none', or another adapter"
            )
        if stage.begin is None:
            before = where
            continue
        at = stage.begin.at_step(steps)
        if at is None:
            _require_validation(where, stage.begin, every, held_out)
            at = (before_at // every + 1 + (stage.begin.plateau or 0)) * every
            moment = f"step {at} at the earliest ({stage.begin}, train.validate_every = {every})"
        else:
            moment = f"step {at}" if stage.begin.step is not None else f"step {at} ({stage.begin})"
        if at >= steps:
            raise StrategyError(
                f"{where} begins at {moment}, but the run only has {steps} steps; let it begin earlier, or "
                "train for more steps"
            )
        if at <= before_at:
            raise StrategyError(
                f"{where} begins at {moment}, which is not after {before} at step {before_at}; move them "
                "apart, or train for more steps"
            )
        before, before_at = where, at


def _require_validation(where: str, begin: Moment, every: int, held_out: bool) -> None:
    problem = ""
    if not every:
        problem = "train.validate_every is 0; set it"
    elif not held_out:
        problem = "no episodes are held out; raise data.validation"
    if problem:
        raise StrategyError(
            f"{where} begins after {begin}, but {problem}, or let it begin at a step or a fraction"
        )
