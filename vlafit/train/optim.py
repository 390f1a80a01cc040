"""AdamW over a tuning plan's groups, the learning-rate schedule, and the moving average of what trains."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlafit.recipe import OptimRecipe
from vlafit.tuning import Plan


def build_optimizer(
    policy: nn.Module, plan: Plan, recipe: OptimRecipe, keep: torch.optim.Optimizer | None = None
) -> torch.optim.AdamW:
    """Return AdamW with fp32 states over the trainable parameters, and over nothing else.

    Parameters that `keep` trains already go on with its states; all others begin with none.
    """
    groups = [dict(group, peak_lr=group["lr"]) for group in plan.groups(policy, recipe)]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True
    )
    if keep is not None:
        for parameter in (p for group in groups for p in group["params"]):
            if parameter in keep.state:
                optimizer.state[parameter] = keep.state[parameter]
    return optimizer


def schedule(step: int, steps: int, recipe: OptimRecipe, spent: float = 0.0) -> float:
    """Return the share of the peak learning rate at optimiser step `step` of `steps`.

    Linear warm-up from peak / (warmup + 1), as in the pi0 reference, then a cosine down to `final_lr`. Where
    training may also end by time, `spent` is the share that is gone; the cosine follows what ends first.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    done = max(spent, (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps))
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def rewarm(step: int, warmup_steps: int) -> float:
    """Return the share of `schedule` at step `step` (from 0) of a stage with a warm-up of its own.

    It is the same for everything that learns, not for what is new alone: AdamW's first steps on new tensors
    are as large as the learning rate, whatever their gradients, and the rest should not run after them at
    full speed meanwhile. (So does fastai, where ULMFiT's gradual unfreezing comes from: each stage is a cycle
    of its own, for all groups.)
    """
    return min(1.0, (step + 1) / (warmup_steps + 1))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Ema:
    """Exponential moving average of the trainable parameters, in fp32.

    The decay grows as (1 + n) / (10 + n) up to its full value after n updates of a parameter, so that short
    runs do not average in their first steps (the rule of TensorFlow's ExponentialMovingAverage with
    `num_updates`), nor later stages what they begin to train.
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates: dict[str, int] = {}
        """Of each parameter, since it began to learn."""
        self.average: dict[str, Tensor] = {}
        self._live: dict[str, nn.Parameter] = {}
        self.follow(policy)

    @torch.no_grad()
    def follow(self, policy: nn.Module) -> None:
        """Average what is trainable now, beginning with its present value where it was not averaged before.

        A parameter that is trainable no more gets its average for good; see `learner.py` for the reason.
        """
        learns = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        for name, p in self._live.items():
            if name not in learns:
                p.copy_(self.average[name])
        self.average = {
            name: self.average[name] if name in self.average else p.detach().clone()
            for name, p in learns.items()
        }
        self.updates = {name: self.updates.get(name, 0) for name in learns}
        self._live = learns

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        for name, live in self._live.items():
            count = self.updates[name] = self.updates[name] + 1
            decay = min(self.decay, (1 + count) / (10 + count))
            self.average[name].lerp_(live.detach(), 1 - decay)

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
