"""Keep weights that no stage trains in bfloat16, which is what a bf16 product reads them in anyway.

A tensor that its file holds in bfloat16 stays so. One that its file holds in float32 is rounded, and a line
of the agreement says how many. Norms, the image tower's patches and positions, and projections stay float32,
and so do weights that are quantised, which start from their full precision.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from vlafit.agreement import Item
from vlafit.checkpoints import stored_as
from vlafit.nn.policy import Policy
from vlafit.tuning import Plan, Strategy, preview
from vlafit.tuning.inject import base_name

ITEM = "frozen weights"
"""Name of the line of the agreement."""


def narrow_names(policy: Policy, plan: Plan) -> set[str]:
    """Return the names of the base weights that a run keeps in bfloat16; `policy` has no adapters."""
    trained = {
        entry.name
        for stage in range(len(plan.strategy.stages))
        for entry in plan.at(stage).entries
        if entry.trainable and not entry.adapts
    }
    quantised = {f"{layer}.weight" for layer in plan.quantised}
    return {
        info.name
        for info in policy.parts()
        if info.name not in trained | quantised and stored_as(info, torch.bfloat16) is torch.bfloat16
    }


@final
class FrozenWeights:
    """Which weights of a run are kept in bfloat16, found out when the policy is loaded."""

    def __init__(self, strategy: Strategy, *, wanted: bool) -> None:
        """Keep the frozen weights of `strategy` in bfloat16 if `wanted`; else all stay float32."""
        self._strategy, self._wanted = strategy, wanted
        self.names: frozenset[str] = frozenset()
        self._rounded = 0
        self._numbers = 0

    def at_first_load(self, policy: Policy, stored: Mapping[str, Tensor], adapted: bool) -> Collection[str]:
        """Return what `at_load` does, or nothing where adapters will be merged into the weights first."""
        return () if adapted else self.at_load(policy, stored, adapted)

    def at_load(self, policy: Policy, stored: Mapping[str, Tensor], adapted: bool) -> Collection[str]:
        """Return which weights of a `policy` on the meta device to load in bfloat16.

        `stored` are the file's tensors, by the policy's names. A weight that PiSSA splits is rounded only
        after it was split.
        """
        if not self._wanted:
            return ()
        plan = preview(policy, self._strategy)
        self._choose(policy, plan, stored)
        split = {f"{layer}.weight" for layer, adapter in plan.adapted.items() if adapter.init == "pissa"}
        return self.names - split

    def in_memory(self, policy: Policy) -> None:
        """Choose among the weights of a bare policy that no file holds: fresh ones, or merged ones."""
        if self._wanted:
            self._choose(policy, preview(policy, self._strategy), dict(policy.named_parameters()))

    def finish(self, policy: Policy) -> None:
        """Make bfloat16 of what is to be so and is not yet: fresh, merged and split weights."""
        for name, parameter in policy.named_parameters():
            if base_name(name) in self.names and parameter.dtype is torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)

    def items(self) -> Iterable[Item]:
        """Return the line of the agreement, if a weight is rounded."""
        if self._rounded:
            yield Item(
                ITEM,
                {"checkpoint": f"float32 ({self._rounded} tensors, {self._numbers / 1e6:.0f} M numbers)"},
                "bfloat16",
                "chosen",
                'train.frozen = "bf16", as in bf16 products; train.frozen = "fp32" keeps them as they are',
            )

    def _choose(self, policy: Policy, plan: Plan, stored: Mapping[str, Tensor]) -> None:
        self.names = frozenset(narrow_names(policy, plan))
        wide = [stored[n] for n in self.names if n in stored and stored[n].dtype is not torch.bfloat16]
        self._rounded, self._numbers = len(wide), sum(tensor.numel() for tensor in wide)
