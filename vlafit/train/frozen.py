"""Keep weights in bfloat16, which is what a bf16 product reads them in anyway: those that no stage trains
(`train.frozen`), and trained matrices where asked for (`train.weights`).

A tensor that its file holds in bfloat16 stays so. One that its file holds in float32 is rounded, and a line
of the agreement says how many. Norms, the image tower's patches and positions, and projections stay float32,
and so do weights that are quantised, which start from their full precision, and biases that are trained.
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

FROZEN, TRAINED = "frozen weights", "trained weights"
"""Names of the lines of the agreement."""
REASONS = {
    FROZEN: 'train.frozen = "bf16", as in bf16 products; train.frozen = "fp32" keeps them as they are',
    TRAINED: 'train.weights = "bf16", each update rounded stochastically; train.weights = "fp32" keeps them '
    "as they are",
}


def narrow_names(policy: Policy, plan: Plan, *, frozen: bool = True, trained: bool = False) -> set[str]:
    """Return the names of the base weights that a run keeps in bfloat16; `policy` has no adapters.

    They are the weights that no stage trains if `frozen`, and matrices that a stage trains if `trained`.
    """
    learning = _trained(plan)
    matrices = {entry.name for entry in plan.entries if len(entry.shape) >= 2}
    quantised = {f"{layer}.weight" for layer in plan.quantised}
    return {
        info.name
        for info in policy.parts()
        if info.name not in quantised
        and stored_as(info, torch.bfloat16) is torch.bfloat16
        and (trained and info.name in matrices if info.name in learning else frozen)
    }


def _trained(plan: Plan) -> set[str]:
    """Return the names of the base weights that any stage trains."""
    return {
        entry.name
        for stage in range(len(plan.strategy.stages))
        for entry in plan.at(stage).entries
        if entry.trainable and not entry.adapts
    }


@final
class FrozenWeights:
    """Which weights of a run are kept in bfloat16, found out when the policy is loaded."""

    def __init__(self, strategy: Strategy, *, wanted: bool, trained: bool = False) -> None:
        """Keep the frozen weights of `strategy` in bfloat16 if `wanted`, and its trained matrices if
        `trained`; else all stay float32.
        """
        self._strategy, self._frozen, self._trained = strategy, wanted, trained
        self.names: frozenset[str] = frozenset()
        self._rounded: dict[str, tuple[int, int]] = {}

    def at_first_load(self, policy: Policy, stored: Mapping[str, Tensor], adapted: bool) -> Collection[str]:
        """Return what `at_load` does, or nothing where adapters will be merged into the weights first."""
        return () if adapted else self.at_load(policy, stored, adapted)

    def at_load(self, policy: Policy, stored: Mapping[str, Tensor], adapted: bool) -> Collection[str]:
        """Return which weights of a `policy` on the meta device to load in bfloat16.

        `stored` are the file's tensors, by the policy's names. A weight that PiSSA splits is rounded only
        after it was split.
        """
        if not (self._frozen or self._trained):
            return ()
        plan = preview(policy, self._strategy)
        self._choose(policy, plan, stored)
        split = {f"{layer}.weight" for layer, adapter in plan.adapted.items() if adapter.init == "pissa"}
        return self.names - split

    def in_memory(self, policy: Policy) -> None:
        """Choose among the weights of a bare policy that no file holds: fresh ones, or merged ones."""
        if self._frozen or self._trained:
            self._choose(policy, preview(policy, self._strategy), dict(policy.named_parameters()))

    def finish(self, policy: Policy) -> None:
        """Make bfloat16 of what is to be so and is not yet: fresh, merged and split weights."""
        for name, parameter in policy.named_parameters():
            if base_name(name) in self.names and parameter.dtype is torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)

    def items(self) -> Iterable[Item]:
        """Return a line of the agreement for the frozen and the trained weights that are rounded."""
        for name, (tensors, numbers) in self._rounded.items():
            yield Item(
                name,
                {"checkpoint": f"float32 ({tensors} tensors, {numbers / 1e6:.0f} M numbers)"},
                "bfloat16",
                "chosen",
                REASONS[name],
            )

    def _choose(self, policy: Policy, plan: Plan, stored: Mapping[str, Tensor]) -> None:
        self.names = frozenset(narrow_names(policy, plan, frozen=self._frozen, trained=self._trained))
        wide = {n for n in self.names if n in stored and stored[n].dtype is not torch.bfloat16}
        learning = _trained(plan)
        chosen = {FROZEN: wide - learning, TRAINED: wide & learning}
        self._rounded = {
            line: (len(names), sum(stored[name].numel() for name in names))
            for line, names in chosen.items()
            if names
        }
