"""What learns in the stage that a run is in: the wrapped policy, its optimiser, its moving average.

A change of stage keeps all that was learned about what goes on learning: AdamW's moments and counts and the
moving average stay. What is new begins with a fresh state, and so does what learns again after a stage in
which it was frozen. Of what is frozen, gradients and states are given up, and its moving average becomes its
weight: so there is one policy, the one that is validated, exported and that the rest goes on learning with,
and the tensor stays bit for bit as it is from there on. (Were the raw weight kept beside the average, the
rest would learn to work with another policy than the one that is exported.)
"""

import gc
import logging
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from vlafit import tuning
from vlafit.nn.policy import Policy
from vlafit.recipe import Recipe
from vlafit.train.distributed import wrap
from vlafit.train.gradients import GradientCheck
from vlafit.train.optim import Ema, build_optimizer
from vlafit.train.stages import Place
from vlafit.tuning import Plan
from vlafit.tuning.ranks import rank_schedule

log = logging.getLogger(__name__)


class Learner:
    """The policy and everything that makes it learn, in one stage after another."""

    def __init__(
        self, policy: Policy, plan: Plan, recipe: Recipe, device: torch.device, place: Place
    ) -> None:
        """Enter the stage of `place`, with fresh states, in the policy to which `plan` was applied."""
        self.policy, self.recipe, self.device = policy, recipe, device
        self.plan, self.place = plan.at(place.number), place
        tuning.enter(policy, self.plan)
        before = plan.at(place.number - 1).trainable if place.number else ()
        self.model: nn.Module = wrap(policy, recipe.train.sharding, device)
        self.optimizer = build_optimizer(policy, self.plan, recipe.optim)
        self.ema = Ema(policy, recipe.optim.ema) if recipe.optim.ema else None
        self.ranks = rank_schedule(policy, plan)
        self._begin(before)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up at the beginning of the stage, beside the recipe's."""
        return self.plan.strategy.stages[self.plan.stage].warmup_steps

    def change(self, place: Place) -> None:
        """Enter the stage of `place`, keeping what was learned so far."""
        before = self.plan.trainable
        self.plan, self.place = self.plan.at(place.number), place
        tuning.enter(self.policy, self.plan)
        if self.ema is not None:
            self.ema.follow(self.policy)
        self.optimizer = build_optimizer(self.policy, self.plan, self.recipe.optim, keep=self.optimizer)
        self._wrap_anew()
        self._begin(before)

    def _begin(self, before: Sequence[str]) -> None:
        new = set(self.plan.trainable) - set(before)
        self.check = GradientCheck(self.policy, self.plan, new)
        if self.ranks is not None:  # last: what is frozen has its average by now
            place, steps = self.place, self.recipe.train.steps
            self.ranks.enter(self.plan, steps=steps, step=place.began, spent=place.spent)

    def _wrap_anew(self) -> None:
        """Let the processes agree anew on what they synchronise: DDP knows only what learned when it began.

        The old wrapper must be gone before: its buffers are as large as all gradients.
        """
        if self.model is self.policy:  # alone, or sharded, which looks at requires_grad in every step
            return
        old, self.model = weakref.ref(self.model), self.policy
        gc.collect()  # the wrapper refers to itself
        if old() is not None:
            log.warning("the wrapper of the stage before is still in use; its memory is not freed")
        self.model = wrap(self.policy, self.recipe.train.sharding, self.device)
