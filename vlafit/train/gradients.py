"""Check that every trainable parameter gets a non-zero gradient within three steps.

Without it, a wrong rule could train nothing for days unnoticed: a tensor that the loss does not reach never
changes, whatever the plan says. Two numbers for each tensor are summed over the processes in the first steps
of each stage; later steps cost nothing. A step does not count where a term of the loss had nothing to learn
from, as where a mixture drew only questions about images.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vlafit.errors import TrainingError
from vlafit.train.distributed import local, sum_over_processes
from vlafit.tuning import Plan
from vlafit.tuning.inject import base_name
from vlafit.tuning.quantise import quantised_names

STEPS = 3
"""LoRA's A has no gradient in the first step, because B is zero; if a layer after it is zero, too,
such as the adaptive norms of a fresh pi0.5 expert, it takes until the third."""
SHOWN = 3  # names of each group in a message


class GradientCheck:
    """Checks the gradients of the first steps of one stage."""

    def __init__(self, policy: nn.Module, plan: Plan, new: Collection[str]) -> None:
        """Watch the plan's trainable tensors; `new` names those that the previous stage did not train.

        Only those must get a non-zero gradient: the others had one before, and may have lost it since
        (AdaLoRA may take all ranks from a layer).
        """
        tensors = {base_name(name): p for name, p in policy.named_parameters()}
        self._trained = {name: tensors[name] for name in plan.trainable}
        self._without = set(new)
        self._from_the_first = False
        self._counted = self._passed = 0  # steps that count, and others
        self._over = False
        self._seen: dict[Tensor, Tensor] = {}
        quantised = {base_name(f"{layer}.weight") for layer in quantised_names(policy)}
        self._frozen = {
            entry.name: tensors[entry.name]
            for entry in plan.entries
            if not (entry.trainable or entry.dead or entry.adapts or entry.name in quantised)
            and len(entry.shape) >= 2
        }
        self._places = {e.name: (e.part, e.kind) for e in plan.entries}
        self._kinds = {e.name: f"{e.part}, {e.kind}{', adapter' if e.adapts else ''}" for e in plan.entries}

    def see(self, parameter: Tensor) -> None:
        """Note a gradient that will be freed before `look`."""
        if not self._over:
            self._seen[parameter] = _has_gradient(parameter)

    def look(self, step: int, is_whole: bool = True) -> None:
        """Check the gradients before the optimiser uses them, or all were seen, in step 1, 2, ... of the
        stage. `is_whole` says, the same on every process, whether every term of the loss had something to
        learn from, and actions counted; only such steps count.

        Every process must call it. Raises TrainingError naming the tensors that have no gradient at all (in
        the first that counts), or only zero gradients on all processes (in the third). A resumed run that did
        not do the first step of the stage is not checked.
        """
        self._from_the_first |= step == 1
        seen, self._seen = self._seen, {}
        if self._over or not self._from_the_first or (self._counted and not self._without):
            self._over = True
            return
        if is_whole:
            self._counted += 1
        else:
            self._passed += 1
        counts = torch.stack([seen[p] if p in seen else _has_gradient(p) for p in self._trained.values()])
        counts = sum_over_processes(counts).tolist()
        for name, (_, nonzero) in zip(self._trained, counts, strict=True):
            if nonzero:
                self._without.discard(name)
        if not is_whole:
            return
        unreached = [name for name, (has, _) in zip(self._trained, counts, strict=True) if not has]
        if unreached:
            raise TrainingError(
                f"the loss does not depend on {len(unreached)} of the {len(self._trained)} trainable "
                f"tensors:\n{self._listed(unreached)}\n"
                'They would never change. Freeze them by a rule (mode = "frozen"); if the policy never uses '
                "them, "
                "its parts() should mark them as dead."
            )
        if self._counted < STEPS:
            return
        self._over = True
        if self._without:
            left_out = f", not counting {self._passed} without actions or answers" if self._passed else ""
            zero = [name for name in self._trained if name in self._without]
            raise TrainingError(
                f"{len(zero)} of the {len(self._trained)} trainable tensors had a gradient of exactly zero "
                f"in the first {STEPS} steps{left_out}:\n{self._listed(zero)}\n{self._zero_matrices()}"
                "They would never change. Check whether the data reach them (a camera that is missing in "
                "every sample? a state that never changes?), and whether a layer after them is zero (it must "
                "be trained "
                'too); or freeze them by a rule (mode = "frozen").'
            )

    def _zero_matrices(self) -> str:
        """Describe the frozen matrices that are all zeros, which block every gradient, and the remedy."""
        nonzero = [_nonzero(tensor) for tensor in self._frozen.values()]
        counts = sum_over_processes(torch.stack(nonzero)).tolist() if nonzero else []
        closed = [name for name, count in zip(self._frozen, counts, strict=True) if not count]
        if not closed:
            return ""
        rules = "".join(
            f'\n  [[rule]]\n  select = {{ part = "{part}", kind = "{kind}" }}\n  mode = "full"\n'
            for part, kind in dict.fromkeys(self._places[name] for name in closed)
        )
        return (
            f"{len(closed)} frozen matrices are zero, such as {closed[0]}: they block activations and "
            "gradients (the adaptive norms of a fresh expert start at zero). Train them, by a rule before "
            f"the others (in every stage, if there are stages):\n{rules}\nOtherwise: "
        )

    def _listed(self, names: list[str]) -> str:
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(self._kinds[name], []).append(name)
        return "\n".join(
            f"  {kind}: {len(same)} tensors, {', '.join(same[:SHOWN])}{', ...' if len(same) > SHOWN else ''}"
            for kind, same in kinds.items()
        )


def _nonzero(tensor: Tensor) -> Tensor:
    """Return as a float32 scalar whether this process's shard has a value other than zero."""
    return local(tensor).any().float()


def _has_gradient(parameter: Tensor) -> Tensor:
    """Return as float32 [2] whether this process's shard has a gradient, and one that is not zero."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(2, device=parameter.device)
    nonzero = local(gradient).any().float()
    return torch.stack((torch.ones_like(nonzero), nonzero))
