"""Bound what rounding may do to a result, from the arithmetic, so that the bound holds on every CPU.

Another instruction set, thread count or order of summation rounds differently, so two correct results differ
by as much as rounding allows. A bound taken from the error of another run is one realisation of rounding.
"""

import math

import torch

# Projections in a row in pi0-tiny: 4 in each layer of the vision tower, the language model and the expert.
ADAPTED_PATH = 4 * (2 + 3 + 3)
# The longest sum in a product of pi0-tiny: the input of an MLP's last projection.
TERMS = 32
# Of a bfloat16 layer with an adapter: the input or the base layer's output, and the sum. Of the merged layer:
# the weight, and the output.
ROUNDINGS = 2 + 2


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def drift(unit: float, roundings: int, scale: torch.Tensor | float) -> float:
    """Return how far `roundings` independent roundings on one path move a result of magnitude `scale`.

    One rounding is uniform within `unit`: a standard deviation of unit / sqrt(3). Independent ones add up as
    in a random walk. The largest of some hundred outputs is 3.5 standard deviations out, and
    3.5 / sqrt(3) = 2.
    """
    return 2 * unit * math.sqrt(roundings) * float(scale)
