"""AdaLoRA's rank schedule (arXiv 2303.10512): which singular values each layer keeps, as training goes on.

peft scores every triplet of singular vectors by weight times gradient, and zeroes the least important ones
until the budget is met; it must be driven by the loop. Its model class adds the orthogonality penalty only to
outputs of transformers' form, so that is written here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vlafit.errors import TrainingError
from vlafit.tuning.adapters import Adapter
from vlafit.tuning.inject import make_groups
from vlafit.tuning.plan import Plan

WARM, SETTLE = 0.1, 0.3  # shares of the steps before the budget falls, and after it has fallen
PRUNINGS = 50  # of the schedule, evenly spread


def rank_schedule(policy: nn.Module, plan: Plan, *, steps: int) -> "RankSchedule | None":
    """Return the schedule of the plan's AdaLoRA adapters over `steps`; None where none learns."""
    learning = {e.adapts.removesuffix(".weight") for e in plan.entries if e.adapts and e.trainable}
    groups = [g for g in make_groups(plan.adapted) if g.adapter.method == "adalora"]
    groups = [g for g in groups if learning & g.layers.keys()]
    if not groups:
        return None
    return RankSchedule(policy, [(g.name, g.adapter) for g in groups], steps)


class RankSchedule:
    """Lowers the ranks of the AdaLoRA adapters `named` in `policy` while it trains for `steps`."""

    def __init__(self, policy: nn.Module, named: list[tuple[str, Adapter]], steps: int) -> None:
        self.policy = policy
        self._named = named
        self._allocators = {name: _allocator(policy, name, adapter, steps) for name, adapter in named}

    def penalty(self) -> Tensor:
        """Return the mean distance of singular vectors from orthogonality, times its weight: a scalar."""
        total = torch.zeros((), device=next(self.policy.parameters()).device)
        for name, adapter in self._named:
            distances = []
            for key, p in self.policy.named_parameters():
                if key.endswith(f".lora_A.{name}"):
                    distances.append(_from_orthogonal(p @ p.T))
                elif key.endswith(f".lora_B.{name}"):
                    distances.append(_from_orthogonal(p.T @ p))
            total = total + adapter.orthogonal * torch.stack(distances).mean()
        return total

    def after_step(self, step: int) -> None:
        """Score what the last step did, and prune when it is time; `step` counts from 1.

        To be called after the optimiser's step, while the gradients are still there. Raises TrainingError
        where a singular vector has none.
        """
        for name, allocator in self._allocators.items():
            bare = [
                key
                for key, p in self.policy.named_parameters()
                if p.grad is None and any(key.endswith(f".lora_{x}.{name}") for x in "ABE")
            ]
            if bare:
                raise TrainingError(
                    f"AdaLoRA: {len(bare)} of its tensors have no gradient, such as {bare[0]}; freeze them "
                    'by a rule before the one with mode = "adalora"'
                )
            allocator.update_and_allocate(self.policy, step)

    def ranks(self) -> dict[str, int]:
        """Return how many singular values each adapted layer has left."""
        found = {}
        for key, p in self.policy.named_parameters():
            layer, _, leaf = key.rpartition(".lora_E.")
            if leaf in self._allocators:
                found[layer] = int((p != 0).sum())
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the running scores, by name."""
        return {
            f"{name}/{what}/{key}": value
            for name, allocator in self._allocators.items()
            for what in ("exp_avg_ipt", "exp_avg_unc")
            for key, value in getattr(allocator, what).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        tensors = dict(self.policy.named_parameters())
        for allocator in self._allocators.values():
            allocator.reset_ipt()
        for key, value in state.items():
            name, what, tensor = key.split("/", 2)
            if name not in self._allocators or tensor not in tensors:
                raise TrainingError(f"the stored AdaLoRA scores {key!r} are not of this policy")
            value = value.to(tensors[tensor].device)
            getattr(self._allocators[name], what)[tensor] = value
            self._allocators[name].ipt.setdefault(tensor, torch.zeros_like(value))


def _allocator(policy: nn.Module, name: str, adapter: Adapter, steps: int) -> Any:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    config = AdaLoraConfig(
        init_r=adapter.rank,
        target_r=adapter.target_rank,
        total_step=steps,
        tinit=round(WARM * steps),
        tfinal=round(SETTLE * steps),
        deltaT=max(1, round((1 - WARM - SETTLE) * steps / PRUNINGS)),
    )
    return RankAllocator(policy, config, name)


def _from_orthogonal(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
