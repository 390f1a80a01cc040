"""Step the optimiser in the backward pass: each tensor once its gradient is complete, which is then freed.

So one gradient exists at a time instead of all of them. The norm of the whole gradient is only known at the
end, so each tensor's gradient is clipped by its own norm. A gradient that is not finite is found at the end,
too, when weights have changed already: nothing of such a step may be saved.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from vlafit.agreement import Item
from vlafit.recipe import OptimRecipe
from vlafit.train.clipping import norm_of
from vlafit.train.gradients import GradientCheck
from vlafit.train.piecewise_adamw import PiecewiseAdamW


def items(recipe: OptimRecipe) -> Iterable[Item]:
    """Return the line of the agreement that says how gradients are clipped, where it is each by itself."""
    if recipe.in_backward is True and recipe.clip_norm > 0:
        yield Item(
            "gradient clipping",
            {"recipe": f"optim.clip_norm = {recipe.clip_norm:g}"},
            "each tensor's gradient by its own norm",
            "chosen",
            "optim.in_backward = true; without it the gradient of all tensors is clipped by its norm",
        )


@dataclass(frozen=True)
class SteppedGradients:
    """The gradients of a backward pass that stepped all tensors."""

    norm: float
    """The norm over all gradients, before clipping."""
    fault: str
    """Words for an error, if a gradient is not finite."""


@final
class StepInBackward:
    """Steps each parameter of an optimiser within `backward()`, until `close`."""

    def __init__(self, optimizer: PiecewiseAdamW, limit: float, check: GradientCheck) -> None:
        """Clip each gradient to the norm `limit`, 0 for none; `check` looks at it before it is freed."""
        self._optimizer, self._check = optimizer, check
        self._limit = limit if limit > 0 else math.inf
        self._norms: dict[str, Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, name, group))
            for group in optimizer.param_groups
            for parameter, name in zip(group["params"], group["names"], strict=True)
        ]

    def close(self) -> None:
        """Step no more."""
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> SteppedGradients:
        """Return what the backward pass has left, once it is over."""
        norms, self._norms = self._norms, {}
        if not norms:
            return SteppedGradients(0.0, "")
        values = torch.stack(list(norms.values())).cpu()  # the only time that a GPU is waited for
        broken = [name for name, finite in zip(norms, values.isfinite().tolist(), strict=True) if not finite]
        if not broken:
            return SteppedGradients(float(values.norm()), "")
        fault = (
            f". The gradient of {broken[0]} was the first of {len(broken)} that are not finite; weights of "
            "this step have changed (optim.in_backward), and nothing of it is saved"
        )
        return SteppedGradients(float(values.norm()), fault)

    @torch.no_grad()
    def _step(self, name: str, group: dict[str, Any], parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._check.see(parameter)
        norm = self._norms[name] = norm_of(parameter.grad)
        factor = None
        if self._limit < math.inf:
            factor = (self._limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        self._optimizer.update(parameter, name, group, factor)
        parameter.grad = None
