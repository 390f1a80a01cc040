"""AdamW's moments in 8 bits, block by block (arXiv 2110.02861), in torchao's format.

torchao's own optimiser compiles its step anew for every shape, or makes several float32 copies of a tensor
without compilation. `piecewise_adamw.py` works on pieces of a tensor, with torchao's functions. Small tensors
keep float32 moments, as in torchao.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from vlafit.errors import ConfigError

BLOCK = 256  # numbers that share a scale: torchao's AdamW8bit
LEAST = 4096  # numbers of a tensor that is quantised: torchao, bitsandbytes
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_quantised(numbers: int) -> bool:
    """Tell whether a tensor of so many numbers has moments in 8 bits."""
    return numbers >= LEAST and numbers % BLOCK == 0


def state_bytes(parameter: Tensor, states: Literal["fp32", "8bit"]) -> int:
    """Return the bytes of a parameter's two moments."""
    numbers = parameter.numel()
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


@final
class MomentsIn8Bits:
    """Reads, updates and writes moments in 8 bits, with the numbers that torchao's codes stand for."""

    def __init__(self) -> None:
        """Raise ConfigError where torchao is not installed."""
        try:
            from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned
        except ImportError as error:
            raise ConfigError(
                f'optim.states = "8bit" needs torchao: pip install "vlafit[quantise]" ({error})'
            ) from error
        signed, unsigned = get_qmap_signed(), get_qmap_unsigned()
        self._numbers: Mapping[str, Sequence[float]] = dict(zip(MOMENTS, (signed, unsigned), strict=True))
        self._maps: dict[tuple[torch.device, str], Tensor] = {}

    def update(
        self, state: Mapping[str, Tensor], name: str, piece: slice, value: Tensor, beta: float
    ) -> Tensor:
        """Move a piece of the moment `name` towards `value`, in place, and return it in float32."""
        from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

        codes = state[f"{name}.codes"][piece]
        scale = state[f"{name}.scale"][piece.start // BLOCK : piece.stop // BLOCK]
        key = (codes.device, name)
        if key not in self._maps:
            self._maps[key] = torch.tensor(self._numbers[name], device=codes.device)
        moment = dequant_with_qmap(codes, self._maps[key], scale).lerp_(value, 1 - beta)
        scaled, new_scale = scale_tensor(moment, BLOCK)
        codes.copy_(quantize_8bit_with_qmap(scaled, self._maps[key]))
        scale.copy_(new_scale)
        return moment
