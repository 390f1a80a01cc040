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
        """Return our name for their parameter. What they alone have keeps its name, which we do not know."""
        for mine, other in self.prefixes:
            if theirs.startswith(other):
                return mine + theirs[len(other) :]
        clash = any(theirs.startswith(mine) for mine, _ in self.prefixes)
        return f"{self.form}:{theirs}" if clash else theirs

    def stored(self, ours: str) -> str:
        """Return the name under which their files hold our parameter, or what they alone have."""
        alone = ours.removeprefix(f"{self.form}:")
        return alone if alone != ours else self.ties.get(ours, self.theirs(ours))


@dataclass(frozen=True)
class Translated:
    """A file's tensors under our names, and what became of the others (their names).

    `theirs` gives the file's name of one of ours. `twins` are second copies of tied weights, whose numbers
    are not compared yet; `odd` says which of them cannot be the same.
    """

    weights: dict[str, Tensor]
    tied: tuple[str, ...]
    unused: tuple[str, ...]
    theirs: Callable[[str], str] = str
    twins: Mapping[str, Tensor] = field(default_factory=dict)
    odd: tuple[str, ...] = ()


def translate(tensors: Mapping[str, Tensor], names: NameMap) -> Translated:
    """Rename a file's tensors.

    Nothing is dropped silently: a tensor that we do not know keeps a name of its own, which `fit` refuses. No
    number is read: `fit` compares those of the two copies of a tied tensor.
    """
    weights, tied, unused, odd = {}, [], [], []
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
        one, other = weights.setdefault(ours, tensors[theirs]), tensors[theirs]
        if one is other:
            continue
        if one.shape == other.shape and one.dtype == other.dtype:
            twins[ours] = other
        else:
            both = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (other, one)]
            odd.append(f"tied, but different: {theirs} is {both[0]}, {origin[ours]} is {both[1]}")

    def named(ours: str) -> str:
        return origin.get(ours) or names.stored(ours)

    return Translated(weights, tuple(tied), tuple(unused), named, twins, tuple(odd))


def back(weights: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Rename our tensors to theirs; what they tie is stored once, under the tied name."""
    return {names.ties.get(ours, names.theirs(ours)): tensor for ours, tensor in weights.items()}
