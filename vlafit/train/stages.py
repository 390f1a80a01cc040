"""When the stages of a strategy begin in a run, and which of them never could.

Everything here is a function of the run's length, the steps done and where the run stands (`Place`), so that
every process, and a run that goes on after an interruption, comes to the same answer. A change belongs before
the step that follows it: the checkpoint of the step before is still of the old stage. How a stage begins is
said in `learner.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlafit.errors import StrategyError
from vlafit.recipe import TrainRecipe
from vlafit.tuning import Moment, Plan, Stage


@dataclass(frozen=True)
class Place:
    """Where a run stands among its stages; it is saved with every checkpoint."""

    number: int = 0
    """The stage that the run is in, counted from 0."""
    began: int = 0
    """Optimiser steps that were done when it began."""
    lowest: float | None = None
    """The lowest validation loss since then."""
    stalled: int = 0
    """Validations in a row, up to now, that were not lower than it."""
    spent: float = 0.0
    """Share of a time budget that was gone when it began."""

    def validated(self, loss: float) -> "Place":
        """Return the place after one more validation. The first of a stage sets the mark."""
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest):
            return replace(self, lowest=loss, stalled=0)
        return replace(self, stalled=self.stalled + 1)


def due(stages: Sequence[Stage], steps: int, step: int, place: Place, spent: float = 0.0) -> int:
    """Return the number of the stage that a run of `steps` is in after `step` of them.

    `spent` is the share of a time budget that is gone: a fraction counts whichever of steps and time is
    further. The stage is never an earlier one than `place` says. Where several moments have come, the latest
    stage wins: the ones between are passed over.
    """
    found = place.number
    for number in range(place.number + 1, len(stages)):
        begin = stages[number].begin
        assert begin is not None
        at = begin.at_step(steps)
        if at is None:
            assert begin.plateau is not None
            if number == place.number + 1 and place.stalled >= begin.plateau:
                found = number
        elif step >= at or spent >= (begin.fraction or math.inf):
            found = number
    return found


def length(stages: Sequence[Stage], steps: int, place: Place) -> int:
    """Return for how many steps the stage of `place` can last, a plateau not coming before."""
    moments = [stage.begin.at_step(steps) for stage in stages[place.number + 1 :] if stage.begin]
    return min([steps, *(at for at in moments if at is not None)]) - place.began


def depends_on_validation(stages: Sequence[Stage]) -> bool:
    """Tell whether validation decides when a stage begins."""
    return any(stage.begin is not None and stage.begin.plateau is not None for stage in stages)


def title(plan: Plan) -> str:
    """Return what a reader calls the plan's stage: its number, counted from 1, and its name."""
    name = plan.strategy.stages[plan.stage].name
    return f"stage {plan.stage + 1} of {len(plan.strategy.stages)}{f', {name}' if name else ''}"


def require_reachable(plan: Plan, train: TrainRecipe, *, held_out: bool) -> None:
    """Raise StrategyError where a stage of the plan's strategy can never begin in such a run.

    `held_out` tells whether there is anything to validate on. AdaLoRA on sharded weights is refused, too.
    """
    stages, steps, every = plan.strategy.stages, train.steps, train.validate_every
    before, before_at = "", 0
    for number, stage in enumerate(stages):
        where = f"strategy {plan.strategy.name!r}: stage {number + 1}"
        where += f" ({stage.name})" if stage.name else ""
        if train.sharding == "full" and any(r.adapter and r.adapter.method == "adalora" for r in stage.rules):
            raise StrategyError(
                f"{where}: AdaLoRA reads its scores from whole gradients, which train.sharding = 'full' "
                "takes apart; take train.sharding = 'none', or another adapter"
            )
        if train.sharding == "full" and any(r.quantise for r in stage.rules):
            raise StrategyError(f"{where}: quantised weights cannot be sharded; take train.sharding = 'none'")
        if stage.begin is None:
            before = where
            continue
        at = stage.begin.at_step(steps)
        if at is None:
            _require_validation(where, stage.begin, every, held_out)
            at = (before_at // every + 1 + (stage.begin.plateau or 0)) * every
            says = f"step {at} at the earliest ({stage.begin}, train.validate_every = {every})"
        else:
            says = f"step {at}" if stage.begin.step is not None else f"step {at} ({stage.begin})"
        if at >= steps:
            raise StrategyError(
                f"{where} begins at {says}; the run has {steps}, so that it would never train; let it begin "
                "earlier, or train for more steps"
            )
        if at <= before_at:
            raise StrategyError(
                f"{where} begins at {says}, but {before} at step {before_at}, so that this one would never "
                "train; move the moments apart, or train for more steps"
            )
        before, before_at = where, at


def _require_validation(where: str, begin: Moment, every: int, held_out: bool) -> None:
    lacks = ""
    if not every:
        lacks = "train.validate_every is 0; set it"
    elif not held_out:
        lacks = "no episodes are held out; raise data.validation"
    if lacks:
        raise StrategyError(
            f"{where} begins after {begin}, but {lacks}, or let it begin at a step or a fraction"
        )
