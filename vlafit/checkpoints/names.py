"""Two-way maps between our parameter names and those of another program's files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlafit.checkpoints.fit import complain


@dataclass(frozen=True)
class NameMap:
    """How another program names the parameters of a policy.

    `prefixes` are pairs (ours, theirs); the first that fits decides, and a name that none fits is the same on
    both sides. `ties` gives, for one of our names, a further name under which the same tensor may be found.
    `unused` are tensors of theirs that feed nothing.
    """

    form: str
    prefixes: tuple[tuple[str, str], ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def theirs(self, ours: str) -> str:
        """Return their name for our parameter."""
        for mine, other in self.prefixes:
            if ours.startswith(mine):
                return other + ours[len(mine) :]
        return ours

    def ours(self, theirs: str) -> str:
        """Return our name for their parameter. What they alone have keeps its name, which we do not know."""
        for mine, other in self.prefixes:
            if theirs.startswith(other):
                return mine + theirs[len(other) :]
        clash = any(theirs.startswith(mine) for mine, _ in self.prefixes)
        return f"{self.form}:{theirs}" if clash else theirs


@dataclass(frozen=True)
class Translated:
    """A file's tensors under our names, and what became of the others (their names)."""

    weights: dict[str, Tensor]
    tied: tuple[str, ...]
    unused: tuple[str, ...]


def translate(tensors: Mapping[str, Tensor], names: NameMap, where: str) -> Translated:
    """Rename a file's tensors. Raises WeightsError when two copies of a tied tensor differ.

    Nothing is dropped silently: a tensor that we do not know keeps a name of its own, which `fit` refuses.
    """
    weights, tied, unused = {}, [], []
    alias = {theirs: ours for ours, theirs in names.ties.items()}
    for theirs, tensor in tensors.items():
        if theirs in names.unused:
            unused.append(theirs)
        elif theirs not in alias:
            weights[names.ours(theirs)] = tensor
    for theirs, ours in alias.items():
        if theirs not in tensors:
            continue
        tied.append(theirs)
        if ours not in weights:
            weights[ours] = tensors[theirs]
        elif not _same(weights[ours], tensors[theirs]):
            complain(where, {"tied, but different": [f"{theirs} and {names.theirs(ours)}"]})
    return Translated(weights, tuple(tied), tuple(unused))


def back(weights: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Rename our tensors to theirs; what they tie is stored once, under the tied name."""
    return {names.ties.get(ours, names.theirs(ours)): tensor for ours, tensor in weights.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
