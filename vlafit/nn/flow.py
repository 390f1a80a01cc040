"""Flow matching as pi0 does it: time runs from 1 (noise) to 0 (actions), opposite to the paper's text.

Facts from the reference implementation: t ~ Beta(1.5, 1) * 0.999 + 0.001; x_t = t * noise + (1 - t) *
actions; the network learns the velocity u = noise - actions; sampling is Euler from t = 1.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["float64", "float32"]

BETA_A = 1.5  # time ~ Beta(1.5, 1), whose distribution function is t^1.5: reference implementation
TIME_SCALE, TIME_OFFSET = 0.999, 0.001
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time embedding: reference implementation


def time_from_uniform(uniform: Tensor) -> Tensor:
    """Turn float64 draws from [0, 1) into float32 flow times, by inverting Beta(1.5, 1): F(t) = t^1.5."""
    return (uniform ** (1 / BETA_A) * TIME_SCALE + TIME_OFFSET).float()


def time_embedding(time: Tensor, width: int, rounding: Rounding = "float64") -> Tensor:
    """Return sines, then cosines, [..., width] of `time` [...]; float32, from angles up to 1571.

    `rounding` is the precision of the angles, and not a detail: the sines of the two are up to 4e-4 apart.
    openpi's PyTorch code and LeRobot use float64; openpi's JAX code rounds every step to float32, as here.
    """
    if rounding == "float32":
        angles = time.float()[..., None] * _float32_frequencies(width // 2, time.device)
        return torch.cat((angles.sin(), angles.cos()), -1)
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = time[..., None].double() * (2 * math.pi / period)
    return torch.cat((angles.sin(), angles.cos()), -1).float()


def of_steps(embedded: Tensor, steps: int) -> Tensor:
    """Return embedded times for each step of a chunk [b, k, t, d], of [b, k, d] or already of each step."""
    return embedded if embedded.ndim == 4 else embedded[:, :, None].expand(-1, -1, steps, -1)


@cache
def _float32_frequencies(count: int, device: torch.device) -> Tensor:
    """Return 2 pi / period as `jax.numpy` rounds it; computed on the CPU, so that every device has the same.

    It is copied to `device` once: a copy waits for the GPU, and a CUDA graph cannot hold one.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        step = torch.ones((), dtype=torch.float32) / max(count - 1, 1)
        fraction = torch.arange(count, dtype=torch.float32) * step  # jnp.linspace, whose last value is exact
        fraction[1:][-1:] = 1.0
        power = ((MAX_PERIOD / MIN_PERIOD) ** fraction.double()).float()
        return (1.0 / (MIN_PERIOD * power) * 2 * math.pi).to(device)


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return x_t for `noise` [..., t, a] and `time` [...]; `actions` broadcasts against `noise`."""
    time = time[..., None, None]
    return time * noise + (1 - time) * actions


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 (`noise`) to t = 0 in `steps` equal steps."""
    x = noise
    for step in range(steps):
        x = x - velocity(x, 1.0 - step / steps) / steps
    return x
