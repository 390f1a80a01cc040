"""A run's check of itself: what is to learn has a gradient, and a real one within three steps.

Without it a wrong rule trains nothing for days and nobody sees it: a tensor that the loss does not reach
stays as it was, whatever the table says. Two numbers a tensor are added up over the processes in the first
steps of each stage; later steps cost nothing.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlafit.errors import TrainingError
from vlafit.train.distributed import sum_over_processes
from vlafit.tuning import Plan
from vlafit.tuning.inject import base_name
from vlafit.tuning.quantise import quantised_names

STEPS = 3
"""LoRA's A has no gradient in the first step, for B is zero; where what reads the adapted layer begins
closed, as the adaptive norms of a fresh pi0.5 expert do, it takes the third."""
SHOWN = 3  # names of each kind in a message


class GradientCheck:
    """Looks at the gradients of the first steps of one stage."""

    def __init__(self, policy: nn.Module, plan: Plan, new: Collection[str]) -> None:
        """Watch the plan's trainable tensors; `new` names those that did not learn before this stage.

        Only those must show a gradient other than zero: the others did so before, and may have become still
        since (AdaLoRA takes all ranks from a layer that needs none).
        """
        tensors = {base_name(name): p for name, p in policy.named_parameters()}
        self._learns = {name: tensors[name] for name in plan.trainable}
        self._still = set(new)
        self._from_the_first = False
        rounded = {base_name(f"{layer}.weight") for layer in quantised_names(policy)}
        self._frozen = {
            entry.name: tensors[entry.name]
            for entry in plan.entries
            if not (entry.trainable or entry.dead or entry.adapts or entry.name in rounded)
            and len(entry.shape) >= 2
        }
        self._places = {e.name: (e.part, e.kind) for e in plan.entries}
        self._kinds = {e.name: f"{e.part}, {e.kind}{', adapter' if e.adapts else ''}" for e in plan.entries}

    def look(self, step: int) -> None:
        """Look at the gradients as they are before the optimiser uses them, in step 1, 2, ... of the stage.

        Every process must call it. Raises TrainingError naming the tensors that have no gradient at all (at
        the first step), or that had none but zero on any process (at the third). A resumed run that has not
        seen the first step of the stage says nothing.
        """
        self._from_the_first |= step == 1
        if step > STEPS or not self._from_the_first or not (step == 1 or self._still):
            return
        found = torch.stack([_look(parameter) for parameter in self._learns.values()])
        found = sum_over_processes(found).tolist()
        for name, (_, moves) in zip(self._learns, found, strict=True):
            if moves:
                self._still.discard(name)
        none = [name for name, (has, _) in zip(self._learns, found, strict=True) if not has]
        if none:
            raise TrainingError(
                f"the loss does not reach {len(none)} of the {len(self._learns)} tensors that are to learn:\n"
                f"{self._listed(none)}\n"
                'They would stay as they are. Freeze them by a rule (mode = "frozen"); if the policy never '
                "uses them, its parts() should call them dead."
            )
        if step == STEPS and self._still:
            still = [name for name in self._learns if name in self._still]
            raise TrainingError(
                f"{len(still)} of the {len(self._learns)} tensors that are to learn had a gradient of "
                f"exactly zero in the first {STEPS} steps:\n{self._listed(still)}\n{self._closed()}"
                "They would stay as they are. Look whether the data feed them (a camera that is missing in "
                "every sample? a state that never changes?), and whether what lies behind them is open (a "
                "part that starts from zero must learn too); or freeze them by a rule "
                '(mode = "frozen").'
            )

    def _closed(self) -> str:
        """Say which frozen matrices are all zeros, so that nothing behind them learns, and the way out."""
        looks = [_holds(tensor) for tensor in self._frozen.values()]
        held = sum_over_processes(torch.stack(looks)).tolist() if looks else []
        closed = [name for name, some in zip(self._frozen, held, strict=True) if not some]
        if not closed:
            return ""
        rules = "".join(
            f'\n  [[rule]]\n  select = {{ part = "{part}", kind = "{kind}" }}\n  mode = "full"\n'
            for part, kind in dict.fromkeys(self._places[name] for name in closed)
        )
        return (
            f"{len(closed)} frozen matrices are zero, such as {closed[0]}: nothing passes them, forwards or "
            "back (the adaptive norms of a fresh expert begin so). Let them learn, by a rule before the "
            f"others (in every stage, where there are stages):\n{rules}\nFailing that: "
        )

    def _listed(self, names: list[str]) -> str:
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(self._kinds[name], []).append(name)
        return "\n".join(
            f"  {kind}: {len(some)} tensors, {', '.join(some[:SHOWN])}{', ...' if len(some) > SHOWN else ''}"
            for kind, some in kinds.items()
        )


def _holds(tensor: Tensor) -> Tensor:
    """Return, a float32 scalar, whether this process's share holds anything but zeros."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).any().float()


def _look(parameter: Tensor) -> Tensor:
    """Return, float32 [2], whether this process's share has a gradient, and one that is not zero."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(2, device=parameter.device)
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    moves = gradient.any().float()
    return torch.stack((torch.ones_like(moves), moves))
