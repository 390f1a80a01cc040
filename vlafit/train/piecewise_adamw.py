"""AdamW for weights in float32 or bfloat16 and moments in float32, here or on the host, or 8 bits, by pieces.

Whatever the tensors are kept in, an update is computed in float32 copies of a piece, so that the workspace
has a bound on every device. bfloat16 weights are rounded stochastically (`stochastic_rounding.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from vlafit.train import adam8bit
from vlafit.train.adam8bit import MOMENTS, MomentsIn8Bits, States, is_quantised
from vlafit.train.stochastic_rounding import RoundingBits, round_stochastically

PIECE = 2**22  # numbers that are worked on at a time; a multiple of adam8bit.BLOCK
WORKSPACE = 28  # bytes for a number of a piece: gradient, weight, moments, a square, one scaled, its code


def workspace(numbers: int) -> int:
    """Return the most bytes that an update of a tensor of so many numbers takes for a moment."""
    return WORKSPACE * min(numbers, PIECE)


@final
class PiecewiseAdamW(torch.optim.Optimizer):
    """AdamW with groups as torch's takes them, and the tensors' `names` in each; its states are tensors.

    The caller sets `number` to the optimiser step, from 0, before gradients are used.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        *,
        states: States = "fp32",
        seed: int = 0,
        frees_gradients: bool = False,
    ) -> None:
        """`seed` is that of stochastic rounding; `frees_gradients` says that the backward pass steps."""
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.number = 0
        self.frees_gradients = frees_gradients
        self._seed = seed
        self._moments = MomentsIn8Bits() if states == "8bit" else None
        self._on_host = states == "cpu"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter, name in zip(group["params"], group["names"], strict=True):
                if parameter.grad is not None:
                    self.update(parameter, name, group)

    @torch.no_grad()
    def update(
        self, parameter: nn.Parameter, name: str, group: Mapping[str, Any], factor: Tensor | None = None
    ) -> None:
        """Update one parameter by its gradient, times `factor` if there is one."""
        assert parameter.grad is not None
        state = self.state[parameter] or self.empty_state(parameter)
        self.state[parameter] = state
        if self._on_host and parameter.is_cuda:
            state |= {name: state[name].pin_memory() for name in MOMENTS if not state[name].is_pinned()}
        before = state["step"].clone()
        state["step"] += 1
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        bits = None
        if parameter.dtype is torch.bfloat16:
            bits = RoundingBits(self._seed, self.number, name, parameter.device)
        for piece in _pieces(parameter.numel()):
            gradient = gradients[piece].float()
            if factor is not None:
                gradient = gradient * factor
            values = weights[piece].float()  # float32 weights are no copy, and change in place
            if self._in_8_bits(parameter):
                self._update_8bit(values, gradient, state, piece, group)
            else:
                moments = [state[name][piece] for name in MOMENTS]
                own = [self._here(moment, parameter.device) for moment in moments]
                _update(values, gradient, own, group, before.clone())
                if self._on_host:
                    for kept, moved in zip(moments, own, strict=True):
                        kept.copy_(moved)  # which waits: a checkpoint may read it next
            if bits is not None:
                weights[piece] = round_stochastically(values, bits.draw(len(values)))

    def empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        count = {"step": torch.zeros((), device=parameter.device)}
        if self._in_8_bits(parameter):
            return count | adam8bit.empty_moments(parameter)
        place = torch.device("cpu") if self._on_host else parameter.device
        return count | {name: torch.zeros(parameter.numel(), device=place) for name in MOMENTS}

    def _here(self, moment: Tensor, device: torch.device) -> Tensor:
        """Return a piece of a moment where the update is computed: a copy, if it is kept on the host."""
        return moment.to(device, non_blocking=True, copy=True) if self._on_host else moment

    def _in_8_bits(self, parameter: Tensor) -> bool:
        return self._moments is not None and is_quantised(parameter.numel())

    def _update_8bit(
        self,
        values: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        piece: slice,
        group: Mapping[str, Any],
    ) -> None:
        assert self._moments is not None
        (beta1, beta2), count = group["betas"], state["step"]
        first = self._moments.update(state, MOMENTS[0], piece, gradient, beta1)
        second = self._moments.update(state, MOMENTS[1], piece, gradient.square(), beta2)
        correction1, correction2 = 1 - beta1**count, (1 - beta2**count).sqrt()
        step = (first / correction1) / (second.sqrt() / correction2 + group["eps"])
        values -= group["lr"] * (step + group["weight_decay"] * values)


def _update(
    values: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    group: Mapping[str, Any],
    count: Tensor,
) -> None:
    """Update a piece as torch's fused AdamW does after `count` steps, which it raises by one."""
    first, second = moments
    beta1, beta2 = group["betas"]
    adamw(
        [values], [gradient], [first], [second], [], [count], fused=True, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


def _pieces(numbers: int) -> Iterator[slice]:
    for begin in range(0, numbers, PIECE):
        yield slice(begin, min(begin + PIECE, numbers))
