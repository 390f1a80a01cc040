"""Bound what rounding may do to a result, from the arithmetic, so that the bound holds on every CPU.

Another instruction set, thread count or order of summation rounds differently, so two correct results differ
by as much as rounding allows. A bound taken from the error of another run is itself one realisation of rounding.
"""

import math

import torch

ADAPTED_PATH = 4 * (
    2 + 3 + 3
)  # projections in a row in pi0-tiny: 4 in each layer of vision, language, expert
TERMS = 32  # the longest sum in a product of pi0-tiny: the input of an MLP's last projection
ROUNDINGS = (
    4  # of a bfloat16 layer with an adapter and of the merged one: input or base output, sum; weight, sum
)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def drift(unit: float, roundings: int, scale: torch.Tensor | float) -> float:
    """Return how far `roundings` independent roundings on one path move a result of magnitude `scale`.

    One rounding is uniform within `unit`, so its standard deviation is unit / sqrt(3). Independent ones add
    up like a random walk. The largest of some hundred outputs is 3.5 standard deviations out: 3.5 / sqrt(3) = 2.
    """
    return 2 * unit * math.sqrt(roundings) * float(scale)
