"""Diffusion of actions as OpenVLA-OFT's: a cosine schedule of 50 steps, and DDIM to take noise away.

The arithmetic is that of diffusers' DDIMScheduler with `squaredcos_cap_v2`, prediction of the noise, clipped
samples and no noise added on the way. Song et al. 2020, arXiv 2010.02502.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlafit.errors import ConfigError

TRAIN_STEPS = 50  # openvla-oft, action_heads.py: num_diffusion_steps_train
MOST_BETA = 0.999  # diffusers, betas_for_alpha_bar


def alphas() -> Tensor:
    """Return what is left of an action after each step, float32 [50]."""

    def left(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - left((i + 1) / TRAIN_STEPS) / left(i / TRAIN_STEPS), MOST_BETA) for i in range(TRAIN_STEPS)
    ]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), 0)


def noised(actions: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Return `actions` [b, t, a] after `steps` (int64 [b]) of the schedule with `noise` [b, t, a]."""
    kept = alphas().to(actions.device)[steps][:, None, None]
    return kept.sqrt() * actions + (1 - kept).sqrt() * noise


def embedded(steps: Tensor, width: int) -> Tensor:
    """Return sines and cosines [b, width] of the steps [b], float32."""
    half = width // 2
    exponents = torch.arange(half, device=steps.device) * (-math.log(10_000) / (half - 1))
    angles = steps[:, None].float() * exponents.exp()[None]
    return torch.cat((angles.sin(), angles.cos()), -1)


def sample(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, count: int) -> Tensor:
    """Return actions [b, t, a] made of `noise` in `count` steps.

    `predict` returns the noise in actions [b, t, a] after steps [b]. Raises ConfigError for more steps than
    the schedule has.
    """
    if count > TRAIN_STEPS:
        raise ConfigError(
            f"{count} sampling steps; the diffusion head was trained with {TRAIN_STEPS}: at most"
        )
    stride, kept = TRAIN_STEPS // count, alphas().to(noise.device)
    x = noise
    for step in range((count - 1) * stride, -1, -stride):
        now, then = kept[step], kept[step - stride] if step >= stride else kept.new_ones(())
        error = predict(x, torch.full((len(x),), step, device=x.device))
        clean = ((x - (1 - now).sqrt() * error) / now.sqrt()).clamp(-1, 1)
        x = then.sqrt() * clean + (1 - then).sqrt() * error
    return x
