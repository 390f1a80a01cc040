"""AdamW over a tuning plan's groups, the learning-rate schedule, and the moving average of what trains."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlafit.recipe import OptimRecipe
from vlafit.tuning import Plan


def build_optimizer(policy: nn.Module, plan: Plan, recipe: OptimRecipe) -> torch.optim.AdamW:
    """Return AdamW with fp32 states over the trainable parameters, and over nothing else."""
    groups = [dict(group, peak_lr=group["lr"]) for group in plan.groups(policy, recipe)]
    return torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True
    )


def schedule(step: int, steps: int, recipe: OptimRecipe, spent: float = 0.0) -> float:
    """Return the share of the peak learning rate at optimiser step `step` of `steps`.

    Linear warm-up from peak / (warmup + 1), as in the pi0 reference, then a cosine down to `final_lr`. Where
    training may also end by time, `spent` is the share that is gone; the cosine follows what ends first.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    done = max(spent, (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps))
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Ema:
    """Exponential moving average of the trainable parameters, in fp32.

    The decay grows as (1 + n) / (10 + n) up to its full value after n updates, so that short runs do not
    average in their first steps (the rule of TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, live in zip(self.average.values(), self._live.values(), strict=True):
            average.lerp_(live.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the policy's weights are the average; afterwards they are as before."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, p in self._live.items():
            p.copy_(source[name])
