"""Two-way maps between our parameter names and those of another program's files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
        """Return our name for their parameter. An unknown one keeps its name."""
        for mine, other in self.prefixes:
            if theirs.startswith(other):
                return mine + theirs[len(other) :]
        clash = any(theirs.startswith(mine) for mine, _ in self.prefixes)
        return f"{self.form}:{theirs}" if clash else theirs

    def stored(self, ours: str) -> str:
        """Return the name under which their files hold our parameter, or an unknown one."""
        unknown = ours.removeprefix(f"{self.form}:")
        return unknown if unknown != ours else self.ties.get(ours, self.theirs(ours))


@dataclass(frozen=True)
class Translated:
    """A file's tensors under our names, and what became of the others (by the file's names)."""

    weights: dict[str, Tensor]
    tied: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    file_name: Callable[[str], str] = str
    """The file's name of one of ours."""
    twins: Mapping[str, Tensor] = field(default_factory=dict)
    """Second copies of tied weights, whose numbers are not compared yet."""
    conflicts: tuple[str, ...] = ()
    """Lines that name the second copies that cannot be equal."""


def translate(tensors: Mapping[str, Tensor], names: NameMap) -> Translated:
    """Rename a file's tensors.

    Nothing is dropped silently: an unknown tensor keeps a name of its own, which `fit` refuses. No number is
    read: `fit` compares those of the two copies of a tied tensor.
    """
    weights, tied, unused, conflicts = {}, [], [], []
    twins: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    alias = {theirs: ours for ours, theirs in names.ties.items()}
    for theirs, tensor in tensors.items():
        if theirs in names.unused:
            unused.append(theirs)
        elif theirs not in alias:
            weights[names.ours(theirs)] = tensor
            origin[names.ours(theirs)] = theirs
    for theirs, ours in alias.items():
        if theirs not in tensors:
            continue
        tied.append(theirs)
        first, second = weights.setdefault(ours, tensors[theirs]), tensors[theirs]
        if first is second:
            continue
        if first.shape == second.shape and first.dtype == second.dtype:
            twins[ours] = second
        else:
            both = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (second, first)]
            conflicts.append(f"tied, but different: {theirs} is {both[0]}, {origin[ours]} is {both[1]}")

    def file_name(ours: str) -> str:
        return origin.get(ours) or names.stored(ours)

    return Translated(weights, tuple(tied), tuple(unused), file_name, twins, tuple(conflicts))


def back(weights: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Rename our tensors to theirs; what they tie is stored once, under the tied name."""
    return {names.ties.get(ours, names.theirs(ours)): tensor for ours, tensor in weights.items()}
