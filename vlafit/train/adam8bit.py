"""AdamW's moments in 8 bits, block by block (arXiv 2110.02861), with the codes and scales of torchao.

A code stands for a number of a fixed table; the largest number of a block is its scale. Small tensors keep
float32 moments, as in torchao and bitsandbytes.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal, final

import torch
from torch import Tensor

BLOCK = 256  # numbers that share a scale: torchao's AdamW8bit
LEAST = 4096  # numbers of a tensor that is quantised: torchao, bitsandbytes
States = Literal["fp32", "8bit", "cpu"]
"""How moments are kept; "cpu": in float32, in the host's memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
EXPONENTS = 7  # of the table: 10^0 to 10^-6
LEAST_SCALE = 1e-12  # torchao


def is_quantised(numbers: int) -> bool:
    """Tell whether a tensor of so many numbers has moments in 8 bits."""
    return numbers >= LEAST and numbers % BLOCK == 0


def state_bytes(parameter: Tensor, states: States) -> int:
    """Return the bytes of a parameter's two moments beside it; none where they are kept on the host."""
    numbers = parameter.numel()
    if states == "cpu":
        return 0
    if states == "8bit" and is_quantised(numbers):
        return 2 * (numbers + 4 * numbers // BLOCK)
    return 8 * numbers


def empty_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Return moments of zeros in 8 bits, by name; zeros are code 127 or 0 at any scale."""
    numbers, device = parameter.numel(), parameter.device
    return {
        **{f"{name}.codes": torch.zeros(numbers, dtype=torch.uint8, device=device) for name in MOMENTS},
        **{f"{name}.scale": torch.zeros(numbers // BLOCK, device=device) for name in MOMENTS},
    }


@cache
def table(signed: bool) -> tuple[float, ...]:
    """Return the 256 numbers from -1 (or 0) to 1 that codes stand for, in their order.

    In each decade they are the middles of equal steps from a tenth to one, of which each larger decade has
    twice as many: section 1.3 of the paper, and `create_dynamic_map` in bitsandbytes.
    """
    numbers = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        middles = (10 ** (exponent - EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        numbers += [*middles, *(-value for value in middles)] if signed else middles
    return tuple(sorted(numbers))


@final
class MomentsIn8Bits:
    """Reads, updates and writes moments in 8 bits; it keeps a table on each device."""

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.device, str], tuple[Tensor, Tensor]] = {}

    def update(
        self, state: Mapping[str, Tensor], name: str, piece: slice, value: Tensor, beta: float
    ) -> Tensor:
        """Move a piece of the moment `name` towards `value`, in place, and return it in float32."""
        codes = state[f"{name}.codes"][piece]
        scale = state[f"{name}.scale"][piece.start // BLOCK : piece.stop // BLOCK]
        numbers, borders = self._table(codes.device, name)
        moment = numbers.index_select(0, codes.int()).view(-1, BLOCK).mul_(scale[:, None]).view(-1)
        moment.lerp_(value, 1 - beta)
        blocks = moment.view(-1, BLOCK)
        scale.copy_(blocks.abs().amax(-1).clip(LEAST_SCALE))
        scaled = (blocks / scale[:, None]).view(-1)
        codes.copy_(torch.bucketize(scaled, borders, right=True, out_int32=True))
        return moment

    def _table(self, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
        """Return the numbers of the codes [256], and the borders [255] at which the nearest one changes."""
        if (device, name) not in self._tables:
            numbers = torch.tensor(table(SIGNED[name]), device=device)
            self._tables[device, name] = numbers, numbers[:-1] + numbers.diff() * 0.5
        return self._tables[device, name]
