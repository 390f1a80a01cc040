"""Two-way maps between a policy's parameter names and those of another program's files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class NameMap:
    """How another program names the parameters of a policy.

    `prefixes` are pairs (policy, file); the first that fits decides, and a name that none fits is the same on
    both sides. `ties` gives, for a policy's name, a further file name under which the same tensor may be
    found. `unused` are tensors of the file that feed nothing. `apart` are the beginnings of the file names of
    modules that are not inside the model that peft wraps.
    """

    form: str
    prefixes: tuple[tuple[str, str], ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    def file_name(self, name: str) -> str:
        """Return the file's name for a policy's parameter."""
        for in_policy, in_file in self.prefixes:
            if name.startswith(in_policy):
                return in_file + name[len(in_policy) :]
        return name

    def policy_name(self, name: str) -> str:
        """Return the policy's name for a tensor of the file. An unknown one keeps its name."""
        for in_policy, in_file in self.prefixes:
            if name.startswith(in_file):
                return in_policy + name[len(in_file) :]
        clash = any(name.startswith(in_policy) for in_policy, _ in self.prefixes)
        return f"{self.form}:{name}" if clash else name

    def stored(self, name: str) -> str:
        """Return the name under which files hold a policy's parameter, or an unknown one."""
        unknown = name.removeprefix(f"{self.form}:")
        return unknown if unknown != name else self.ties.get(name, self.file_name(name))


@dataclass(frozen=True)
class Translated:
    """A file's tensors under the policy's names, and what became of the others (by the file's names)."""

    weights: dict[str, Tensor]
    tied: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    file_name: Callable[[str], str] = str
    """The file's name of a policy's parameter."""
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
    alias = {in_file: in_policy for in_policy, in_file in names.ties.items()}
    for name, tensor in tensors.items():
        if name in names.unused:
            unused.append(name)
        elif name not in alias:
            parameter = names.policy_name(name)
            weights[parameter] = tensor
            origin[parameter] = name
    for name, parameter in alias.items():
        if name not in tensors:
            continue
        tied.append(name)
        first, second = weights.setdefault(parameter, tensors[name]), tensors[name]
        if first is second:
            continue
        if first.shape == second.shape and first.dtype == second.dtype:
            twins[parameter] = second
        else:
            both = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (second, first)]
            conflicts.append(f"tied, but different: {name} is {both[0]}, {origin[parameter]} is {both[1]}")

    def file_name(parameter: str) -> str:
        return origin.get(parameter) or names.stored(parameter)

    return Translated(weights, tuple(tied), tuple(unused), file_name, twins, tuple(conflicts))


def back(weights: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Rename a policy's tensors to the file's names; tied tensors are stored once, under the tied name."""
    return {names.stored(name): tensor for name, tensor in weights.items()}
