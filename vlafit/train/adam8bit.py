"""AdamW whose moments are kept in 8 bits, block by block (arXiv 2110.02861), in torchao's format.

torchao's own optimiser compiles its step anew for every shape, or makes several float32 copies of a tensor
without compilation. This one works on pieces of a tensor, with torchao's functions, so that its workspace has
a bound on every device. Small tensors keep float32 moments, as in torchao.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, final

import torch
from torch import Tensor

from vlafit.errors import ConfigError

BLOCK = 256  # numbers that share a scale: torchao's AdamW8bit
LEAST = 4096  # numbers of a tensor that is quantised: torchao, bitsandbytes
PIECE = 2**22  # numbers that are worked on at a time; a multiple of BLOCK
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


@final
class AdamW8bit(torch.optim.Optimizer):
    """AdamW with `params`' groups as torch's takes them. Its states are plain tensors: codes and scales."""

    def __init__(
        self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        try:
            from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned
        except ImportError as error:
            raise ConfigError(
                f'optim.states = "8bit" needs torchao: pip install "vlafit[quantise]" ({error})'
            ) from error
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._maps = dict(zip(MOMENTS, (get_qmap_signed(), get_qmap_unsigned()), strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        maps: dict[tuple[torch.device, str], Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or empty_state(parameter)
                self.state[parameter] = state
                state["step"] += 1
                for name in MOMENTS:
                    key = (parameter.device, name)
                    if key not in maps:
                        maps[key] = torch.tensor(self._maps[name], device=parameter.device)
                own = {name: maps[parameter.device, name] for name in MOMENTS}
                _update(parameter, state, group, own)


def empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step; zeros are code 127 or 0 at any scale."""
    state = {"step": torch.zeros((), device=parameter.device)}
    numbers = parameter.numel()
    for name in MOMENTS:
        if is_quantised(numbers):
            state[f"{name}.codes"] = torch.zeros(numbers, dtype=torch.uint8, device=parameter.device)
            state[f"{name}.scale"] = torch.zeros(numbers // BLOCK, device=parameter.device)
        else:
            state[name] = torch.zeros(numbers, device=parameter.device)
    return state


def _pieces(numbers: int) -> Iterator[slice]:
    for begin in range(0, numbers, PIECE):
        yield slice(begin, min(begin + PIECE, numbers))


def _update(
    parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], maps: dict[str, Tensor]
) -> None:
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    assert parameter.grad is not None
    weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
    beta1, beta2 = group["betas"]
    count = state["step"]
    correction1, correction2 = 1 - beta1**count, (1 - beta2**count).sqrt()
    quantised = is_quantised(parameter.numel())
    for piece in _pieces(parameter.numel()):
        gradient = gradients[piece].float()
        moments = []
        for name, beta, value in (
            ("exp_avg", beta1, gradient),
            ("exp_avg_sq", beta2, gradient.square()),
        ):
            if not quantised:
                moments.append(state[name][piece].lerp_(value, 1 - beta))
                continue
            codes = state[f"{name}.codes"][piece]
            scale = state[f"{name}.scale"][piece.start // BLOCK : piece.stop // BLOCK]
            moment = dequant_with_qmap(codes, maps[name], scale).lerp_(value, 1 - beta)
            scaled, new_scale = scale_tensor(moment, BLOCK)
            codes.copy_(quantize_8bit_with_qmap(scaled, maps[name]))
            scale.copy_(new_scale)
            moments.append(moment)
        first, second = moments
        step = (first / correction1) / (second.sqrt() / correction2 + group["eps"])
        weights[piece] -= group["lr"] * (step + group["weight_decay"] * weights[piece])
