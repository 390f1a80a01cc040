"""Guide a flow policy's sampler, so that a new chunk continues the one that is being executed (real-time
chunking).

Inference-time inpainting of Black, Galliker and Levine 2025, "Real-Time Execution of Action Chunking Flow
Policies" (equations 2 to 5), with time as in this package: from 1 (noise) to 0 (actions), where theirs runs
from 0 to 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vlafit.nn.batch import Batch
from vlafit.nn.rng import SampleRng
from vlafit.types import Schedule

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Continuation:
    """Actions that a batch of chunks has to continue, normalised [b, t, a], and the weight of each
    [b, t, a]."""

    actions: Tensor
    weights: Tensor
    max_weight: Tensor  # [b]
    jacobian: bool

    def guided(self, velocity: Velocity) -> Velocity:
        """Return the velocity that leads to chunks which continue `actions`."""

        def guided_velocity(x: Tensor, time: float) -> Tensor:
            with torch.set_grad_enabled(self.jacobian):
                x = x.detach().requires_grad_(self.jacobian)
                v = velocity(x, time)
                clean = x - time * v  # the chunk that the sampler is heading for
                error = (self.actions - clean.detach()) * self.weights
                correction = torch.autograd.grad(clean, x, error)[0] if self.jacobian else error
            return v.detach() - self._strength(time)[:, None, None] * correction

        return guided_velocity

    def _strength(self, time: float) -> Tensor:
        """Return the guidance weight [b]: (1 - tau) / (tau * r^2), at most `max_weight`; tau = 1 - time."""
        tau = 1.0 - time
        if tau <= 0:
            return self.max_weight
        inverse_r2 = (time**2 + tau**2) / time**2
        return self.max_weight.clamp(max=time / tau * inverse_r2)


@runtime_checkable
class GuidedPolicy(Protocol):
    """A policy that can continue a chunk, as real-time chunking needs: any that has `act_guided`."""

    def act_guided(self, batch: Batch, rng: SampleRng, continuation: Continuation) -> Tensor:
        """Return actions [b, t, a] as `act` does, held to the chunks that they have to continue."""
        ...


def prefix_weights(schedule: Schedule, delay: int, end: int, steps: int) -> Tensor:
    """Return how much each step of the old chunk counts [t]: 1 below `delay`, falling to 0 at `end`."""
    delay = min(delay, end)
    match schedule:
        case "zeros":
            return (torch.arange(steps) < delay).float()
        case "ones":
            return (torch.arange(steps) < end).float()
    between = torch.linspace(1, 0, end - delay + 2)[1:-1]  # c_i in the paper, for delay <= i < end
    if schedule == "exponential":
        between = between * torch.expm1(between) / (math.e - 1)
    weights = torch.cat([torch.ones(delay), between, torch.zeros(max(0, steps - end))])
    return weights[:steps]
