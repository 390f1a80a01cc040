"""The state of training in the current stage: the wrapped policy, its optimiser, its EMA.

A change of stage keeps AdamW's moments and counts and the EMA of every parameter that is still trained.
Parameters that are new, or trained again after a stage in which they were frozen, begin with fresh states. A
parameter that is frozen loses its gradient and states, and its EMA becomes its weight, which is bit-identical
from then on. So there is one policy: the one that is validated, exported and trained further. (If the raw
weight were kept beside the EMA, the rest would be trained with another policy than the one that is exported.)
"""

import gc
import logging
import re
import weakref
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from vlafit import heap, tuning
from vlafit.nn.batch import Batch
from vlafit.nn.compiled import compile_blocks, text_multiple
from vlafit.nn.policy import Policy
from vlafit.nn.recompute import recompute_blocks
from vlafit.nn.rng import Keys
from vlafit.recipe import Recipe
from vlafit.train.distributed import wrap
from vlafit.train.ema import Ema
from vlafit.train.feature_cache import indices_of, open_cache
from vlafit.train.gradients import GradientCheck
from vlafit.train.in_backward import StepInBackward
from vlafit.train.optim import build_optimizer
from vlafit.train.packer import packer_of
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.train.stages import Place
from vlafit.tuning import Plan
from vlafit.tuning.ranks import rank_schedule

log = logging.getLogger(__name__)


@final
class TrainState:
    """The policy with its optimiser, EMA and rank schedule, in one stage after another."""

    def __init__(
        self, policy: Policy, plan: Plan, recipe: Recipe, device: torch.device, place: Place
    ) -> None:
        """Enter the stage of `place`, with fresh states, of the policy to which `plan` was applied."""
        self.policy, self.recipe, self.device = policy, recipe, device
        self.plan, self.place = plan.at(place.number), place
        tuning.enter(policy, self.plan)
        self.text_multiple = 16
        """What the length of a trimmed prompt is a multiple of."""
        if recipe.train.compile == "blocks":
            compile_blocks(policy, only_training=True)
            self.text_multiple = text_multiple(policy.needs().max_tokens)
        recompute_blocks(policy, recipe.train.recompute)  # last: it recomputes whole compiled blocks
        before = plan.at(place.number - 1).trainable if place.number else ()
        self.model: nn.Module = wrap(policy, recipe.train, device)
        self.optimizer = build_optimizer(policy, self.plan, recipe.optim, seed=recipe.train.seed)
        self.ema = Ema(policy, recipe.optim.ema) if recipe.optim.ema else None
        self.ranks = rank_schedule(policy, plan)
        self.check = self._begin(before)
        self.in_backward = self._step_in_backward()
        self.cache = open_cache(policy, plan, recipe, device, self.text_multiple)
        self.packer = packer_of(policy, recipe, device)
        self.sees_missing = policy.needs().sees_missing

    def prepare(self, keys: Keys, batch: Batch) -> Batch:
        """Return a micro-batch as it goes into the policy: trimmed, with features, if they are kept, and
        packed, where that pays.
        """
        trimmed = batch.trim(self.text_multiple, sees_missing=self.sees_missing)
        if self.cache is not None:
            trimmed = self.cache.attach(batch, trimmed, indices_of(keys))
        return trimmed if self.packer is None else self.packer.pack(trimmed)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimiser trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def learning_rates(self) -> dict[str, float]:
        """Return `train/lr/RULE` of each rule, by what it selects; empty if all have the same one."""
        groups = self.optimizer.param_groups
        if len({group["peak_lr"] for group in groups}) == 1:
            return {}
        rules, rates = self.plan.rules, {}
        for group in groups:
            for number in group["rules"]:
                name = re.sub(r"[^\w.*=+-]+", "_", str(rules[number].select)).strip("_") or "all"
                rates[f"train/lr/{number + 1}_{name}"] = group["lr"]
        return dict(sorted(rates.items()))

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up at the beginning of the stage, in addition to the recipe's."""
        return self.plan.strategy.stages[self.plan.stage].warmup_steps

    def change(self, place: Place) -> None:
        """Enter the stage of `place`, keeping the states of what is still trained."""
        before = self.plan.trainable
        self.plan, self.place = self.plan.at(place.number), place
        tuning.enter(self.policy, self.plan)
        if self.ema is not None:
            self.ema.follow(self.policy)
        seed = self.recipe.train.seed
        self.optimizer = build_optimizer(
            self.policy, self.plan, self.recipe.optim, keep=self.optimizer, seed=seed
        )
        self._rewrap()
        self.check = self._begin(before)
        if self.in_backward is not None:
            self.in_backward.close()
        self.in_backward = self._step_in_backward()

    def release(self) -> None:
        """Free what training holds: weights, optimiser states, averages, features. Nothing works after it."""
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema = self.cache = self.ranks = None
        for tensor in (*self.policy.parameters(), *self.policy.buffers()):
            if type(tensor.data) is Tensor:  # quantised weights are small, and sharded ones a share
                tensor.data = tensor.data.new_empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step_in_backward(self) -> StepInBackward | None:
        """Let the backward pass step the optimiser of the stage, if the recipe says so."""
        if not (isinstance(self.optimizer, PiecewiseAdamW) and self.optimizer.frees_gradients):
            return None
        if self.device.type == "cpu":
            heap.return_freed_blocks()  # between small tensors that stay
        return StepInBackward(self.optimizer, self.recipe.optim.clip_norm, self.check)

    def _begin(self, before: Sequence[str]) -> GradientCheck:
        """Enter the stage in the rank schedule and return the gradient check of what it newly trains."""
        check = GradientCheck(self.policy, self.plan, set(self.plan.trainable) - set(before))
        if self.ranks is not None:  # last: the EMA is already the weight of what is frozen
            place, steps = self.place, self.recipe.train.steps
            self.ranks.enter(self.plan, steps=steps, step=place.began, spent=place.spent)
        return check

    def _rewrap(self) -> None:
        """Wrap the policy in DDP again: DDP only synchronises what was trainable when it was created.

        The old wrapper is freed first, because its buffers are as large as all gradients.
        """
        if self.model is self.policy:  # one process, or FSDP, which reads requires_grad in every step
            return
        old, self.model = weakref.ref(self.model), self.policy
        gc.collect()  # the wrapper is in a reference cycle
        if old() is not None:
            log.warning("the DDP wrapper of the previous stage is still in use; its memory is not freed")
        self.model = wrap(self.policy, self.recipe.train, self.device)
