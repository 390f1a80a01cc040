"""AdamW over a tuning plan's parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlafit.recipe import OptimRecipe
from vlafit.train.adam8bit import States
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.tuning import Plan


def build_optimizer(
    policy: nn.Module,
    plan: Plan,
    recipe: OptimRecipe,
    keep: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Return AdamW over exactly the trainable parameters, its moments kept as the recipe says.

    Parameters that `keep` already trains keep its states; all others begin without. `seed` is that of the
    stochastic rounding of weights in bfloat16.
    """
    groups = [dict(group, peak_lr=group["lr"]) for group in plan.groups(policy, recipe)]
    trained = [parameter for group in groups for parameter in group["params"]]
    betas, in_backward = (recipe.beta1, recipe.beta2), recipe.in_backward is True
    optimizer: torch.optim.Optimizer
    states = states_of(recipe)
    if states != "fp32" or in_backward or any(p.dtype is torch.bfloat16 for p in trained):
        optimizer = PiecewiseAdamW(
            groups, betas, recipe.eps, states=states, seed=seed, frees_gradients=in_backward
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
    for parameter in trained:
        if keep is not None and parameter in keep.state:
            optimizer.state[parameter] = _in_shape(keep.state[parameter], empty_state(optimizer, parameter))
    return optimizer


def states_of(recipe: OptimRecipe) -> States:
    """Return how the moments are kept, also where that is still automatic."""
    return "fp32" if recipe.states == "auto" else recipe.states


def _in_shape(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state in the shapes of `like`: PiecewiseAdamW keeps moments flat."""
    return {
        name: value if value.shape == like[name].shape else value.view(like[name].shape)
        for name, value in state.items()
    }


def empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the states of a parameter that has not been trained, by name, to be filled."""
    if isinstance(optimizer, PiecewiseAdamW):
        return optimizer.empty_state(parameter)
    # A fused optimiser keeps its step count on the weights' device, never sharded.
    count = torch.zeros((), device=parameter.device)
    return {"step": count, "exp_avg": parameter, "exp_avg_sq": parameter}


def schedule(step: int, steps: int, recipe: OptimRecipe, spent: float = 0.0) -> float:
    """Return the learning rate at optimiser step `step` of `steps`, as a share of the peak.

    Linear warm-up from peak / (warmup + 1), as in the pi0 reference, then a cosine down to `final_lr`, or one
    step at the schedule's end (torch's MultiStepLR with one milestone). With a time limit, `spent` is its
    used share; the cosine follows whichever ends first. The recipe may let the schedule begin later or be
    shorter (`schedule_from`, `schedule_steps`).
    """
    steps = recipe.schedule_steps or steps - recipe.schedule_from
    step -= recipe.schedule_from
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    if recipe.schedule == "step":
        return recipe.final_lr if step >= steps else 1.0
    done = max(spent, (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps))
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def rewarm(step: int, warmup_steps: int) -> float:
    """Return the factor on `schedule` at step `step` (from 0) of a stage with its own warm-up.

    It applies to all trained parameters, not only to new ones: AdamW's first steps on new tensors are as
    large as the learning rate, whatever their gradients, and the others should not follow them at full speed.
    (fastai, where ULMFiT's gradual unfreezing comes from, does the same: each stage is a cycle for all
    groups.)
    """
    return min(1.0, (step + 1) / (warmup_steps + 1))


def begin_step(optimizer: torch.optim.Optimizer, step: int, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak, for the optimiser step `step`, from 0."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    if isinstance(optimizer, PiecewiseAdamW):
        optimizer.number = step
