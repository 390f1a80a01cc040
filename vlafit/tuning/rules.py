"""The rules of a tuning strategy: which parameters a rule takes, and what it says of them.

The first rule that selects a parameter decides about it. A parameter that no rule selects, a rule that
selects nothing, and a rule to which earlier rules leave nothing are errors; `optional = true` permits such an
idle rule, so that one file serves every family of policies.

This file knows names, parts, kinds and layers, not tensors. How rules are written in TOML is `strategy.py`;
what happens to a policy is `plan.py`.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vlafit.errors import StrategyError, did_you_mean
from vlafit.tuning.adapters import METHODS, Adapter, Quantise

PARTS = ("vision", "projector", "language", "expert", "projections")
KINDS = ("attention", "mlp", "norm", "embedding", "conv", "linear")
MODES = ("full", "frozen", *METHODS)

LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<low>\d+)(?:-(?P<high>\d+))?")
TOP = "top"
"""As a layer range: the layers that a stage with `layer_by_layer` has reached, from the top."""


class Described(Protocol):
    """Where a parameter sits, as `vlafit.nn.policy.ParameterInfo` says it."""

    @property
    def name(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def layers(self) -> int: ...


@dataclass(frozen=True)
class Select:
    """Which parameters a rule is about. Every condition that is given must hold; none given selects all."""

    part: tuple[str, ...] = ()
    """Parts of the policy: vision, projector, language, expert, projections."""
    kind: tuple[str, ...] = ()
    """Kinds inside a part: attention, mlp, norm, embedding, conv, linear."""
    layers: str = ""
    """Layers of each part, counted from 0: "4", "4-7" (both included), "first 3" or "last 2"."""
    pattern: tuple[str, ...] = ()
    """Whole parameter names, `*` standing for any text, as in "expert.layers.*.mlp.*". The last resort."""

    def takes(self, info: Described) -> bool:
        """Tell whether every condition holds for the parameter."""
        return (
            (not self.part or info.part in self.part)
            and (not self.kind or info.kind in self.kind)
            and (not self.layers or _in_layers(self.layers, info.layer, info.layers))
            and (not self.pattern or any(fnmatch.fnmatchcase(info.name, p) for p in self.pattern))
        )

    def __str__(self) -> str:
        """Return the conditions in words, for tables and messages."""
        words = [*(["+".join(self.part)] if self.part else []), *(["+".join(self.kind)] if self.kind else [])]
        words += [f"layers {self.layers}"] if self.layers else []
        words += [f"named {' or '.join(self.pattern)}"] if self.pattern else []
        return ", ".join(words) or "everything else"


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters that `select` takes and no earlier rule has taken."""

    select: Select = Select()
    """Which parameters."""
    mode: str = "full"
    """"full": they learn. "frozen": they stay bit for bit what they are. Else the adapter that learns."""
    adapter: Adapter | None = None
    """The adapter and its options, where `mode` names one."""
    lr: float = 1.0
    """Learning rate, times the recipe's."""
    layer_decay: float = 1.0
    """Learning rate of each layer, times that of the layer above it."""
    weight_decay: float | None = None
    """Weight decay of this rule's matrices instead of the recipe's."""
    quantise: Quantise = ""
    """Hold the weights in 4 bits ("nf4") or 8 ("int8"); they are frozen, below an adapter or without one."""
    optional: bool = False
    """Permit that the rule takes nothing."""

    def lr_at(self, info: Described) -> float:
        """Return the learning rate of a parameter, times the recipe's.

        What comes before the first layer (an embedding) counts as one layer below it, what comes after the
        last one (a final norm) as the last.
        """
        if info.layer is None:
            below = info.layers if info.kind in ("embedding", "conv") else 0
        else:
            below = info.layers - 1 - info.layer
        return self.lr * self.layer_decay**below


def _in_layers(layers: str, layer: int | None, count: int) -> bool:
    """Tell whether `layer`, of a part with `count`, lies in the range; what is in no layer never does."""
    match = LAYERS.fullmatch(layers)
    assert match, layers
    if layer is None:
        return False
    if match["end"] == "first":
        return layer < int(match["count"])
    if match["end"] == "last":
        return layer >= count - int(match["count"])
    return int(match["low"]) <= layer <= int(match["high"] or match["low"])


def _reach(layers: str) -> int:
    """Return how many layers a part needs to have for the range to lie within it."""
    match = LAYERS.fullmatch(layers)
    assert match, layers
    return int(match["count"] or 0) or int(match["high"] or match["low"]) + 1


def resolve(infos: Sequence[Described], rules: Sequence[Rule], name: str) -> list[int]:
    """Return, for each parameter, the index of the rule that decides about it; `name` is the strategy's.

    Raises StrategyError for a parameter without a rule, and for an idle rule that is not optional.
    """
    chosen = [next((i for i, r in enumerate(rules) if r.select.takes(info)), -1) for info in infos]
    bare = [info for info, index in zip(infos, chosen, strict=True) if index < 0]
    if bare:
        groups = Counter(f"{info.part}, {info.kind}" for info in bare)
        listed = "\n  ".join(
            f"{what}: {count} tensors, such as {next(i.name for i in bare if f'{i.part}, {i.kind}' == what)}"
            for what, count in groups.items()
        )
        raise StrategyError(
            f"strategy {name!r} says nothing about {len(bare)} of {len(infos)} tensors:\n"
            f"  {listed}\n"
            'Add a rule for them; a last [[rule]] with mode = "frozen" and no `select` covers what is left.'
        )
    used = set(chosen)
    for index, rule in enumerate(rules):
        depth = max((i.layers for i, at in zip(infos, chosen, strict=True) if at == index), default=0)
        if rule.select.layers and depth and _reach(rule.select.layers) > depth and not rule.optional:
            raise StrategyError(
                f"strategy {name!r}: rule {index + 1} ({rule.select}; {rule.mode}) reaches past the {depth} "
                "layers that there are; write the range that you mean (`optional = true` permits it)"
            )
        if index not in used and not rule.optional:
            raise StrategyError(_idle(infos, chosen, rules, name, index))
    return chosen


def _idle(
    infos: Sequence[Described], chosen: Sequence[int], rules: Sequence[Rule], name: str, index: int
) -> str:
    """Explain why a rule takes nothing: earlier rules took it all, or there is nothing of the kind."""
    rule = rules[index]
    here = f"strategy {name!r}: rule {index + 1} ({rule.select}; {rule.mode})"
    takers = sorted({i for info, i in zip(infos, chosen, strict=True) if rule.select.takes(info)})
    if takers:
        named = ", ".join(f"rule {i + 1} ({rules[i].select})" for i in takers)
        return (
            f"{here} is never reached: {named} before it took everything that it selects.\n"
            "Move it up, narrow the earlier rule, or remove it (`optional = true` permits an idle rule)."
        )
    parts = Counter(info.part for info in infos)
    hints = [f"This policy has the parts: {', '.join(f'{p} ({n} tensors)' for p, n in parts.items())}."]
    in_part = [i for i in infos if not rule.select.part or i.part in rule.select.part]
    if in_part and rule.select.kind:
        hints.append(f"Kinds there: {', '.join(sorted({i.kind for i in in_part}))}.")
    if in_part and rule.select.layers:
        depths = {i.part: i.layers for i in in_part if i.layer is not None}
        hints.append(f"Layers there: {', '.join(f'{p} {n}' for p, n in depths.items()) or 'none'}.")
    for pattern in rule.select.pattern:
        near = did_you_mean(pattern, (i.name for i in infos)) if len(infos) else ""
        if near.startswith("; did"):
            hints.append(near.removeprefix("; ").capitalize())
    return f"{here} matches nothing.\n" + " ".join(hints) + " `optional = true` permits an idle rule."
