"""Round float32 to bfloat16 stochastically, so that the mean of many roundings is the number itself.

A bfloat16 weight has 8 bits: an update below half the distance to its neighbour is lost when it is rounded to
the nearest number. Rounded stochastically it moves the weight with a probability that is its share of that
distance (arXiv 2010.06192). The random bits belong to the seed, the step and the tensor, so that a resumed
run draws the same ones; on another kind of device they are others.
"""

import hashlib
from typing import final

import torch
from torch import Tensor

LOW_BITS = 0xFFFF  # of a float32: what bfloat16 leaves away


@final
class RoundingBits:
    """The random bits for one tensor in one optimiser step, drawn piece after piece."""

    def __init__(self, seed: int, step: int, name: str, device: torch.device) -> None:
        key = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "big", signed=True))

    def draw(self, numbers: int) -> Tensor:
        """Return `numbers` uniform int32 from 0 to 2^16 - 1.

        Four are drawn at a time, because on a CPU that is five times as fast.
        """
        fours = torch.empty(-(-numbers // 4), dtype=torch.int64, device=self._generator.device)
        fours.random_(-(2**63), None, generator=self._generator)
        return fours.view(torch.int16)[:numbers].to(torch.int32).bitwise_and_(LOW_BITS)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 `values` [n] in bfloat16, rounded up or down by the random `bits` [n].

    What bfloat16 represents stays as it is, and what is not a number stays so.
    """
    # A sum with 16 random bits carries into the upper half with the probability of the lower half.
    rounded = (values.view(torch.int32) + bits).bitwise_and_(~LOW_BITS).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
