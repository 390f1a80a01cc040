"""The rules of a tuning strategy: which parameters a rule takes, and what it says of them.

The first rule that selects a parameter decides about it. A parameter that no rule selects, a rule that
selects nothing, one to which earlier rules leave nothing, and a part, kind, pattern or layer of a rule that
does not exist are errors; `optional = true` permits all but the first, so that one file serves every family.

This file knows names, parts, kinds and layers, not tensors. How rules are written in TOML is `strategy.py`;
what happens to a policy is `plan.py`.
"""

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vlafit.errors import StrategyError
from vlafit.tuning.adapters import METHODS, Adapter, Quantise

PARTS = ("vision", "projector", "language", "expert", "projections")
KINDS = ("attention", "mlp", "norm", "embedding", "conv", "linear")
MODES = ("full", "frozen", *METHODS)

LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<low>\d+)(?:-(?P<high>\d+))?")
TOP = "top"
"""As a layer range: the layers that a stage with `layer_by_layer` has reached, from the top."""
WILDCARDS = re.compile(r"[*?]|\[[^\]]*\]")
NEAR_NAMES = 3  # that a message shows for a pattern


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


def decide(infos: Sequence[Described], rules: Sequence[Rule], name: str) -> list[int]:
    """Return, for each parameter, the index of the rule that decides about it; `name` is the strategy's.

    Raises StrategyError for a parameter without a rule. Whether each rule says what it means is `resolve`'s
    to ask: a plan that was accepted once is not asked again.
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
    return chosen


def resolve(infos: Sequence[Described], rules: Sequence[Rule], name: str) -> list[int]:
    """Return what `decide` does, once every rule that is not optional is known to say what it means.

    Raises StrategyError for a parameter without a rule, and one that names all of: rules that take nothing;
    parts, kinds, layers and patterns of a rule that match nothing beside others that do.
    """
    chosen = decide(infos, rules, name)
    problems = []
    for index, rule in enumerate(rules):
        here = f"rule {index + 1} ({rule.select}; {rule.mode})"
        if rule.optional:
            continue
        if index in chosen:
            problems += [f"{here}: {said}" for said in _empty_words(infos, rule.select)]
        else:
            problems.append(f"{here} {_idle(infos, chosen, rules, index)}")
    if problems:
        raise StrategyError("\n".join(f"strategy {name!r}: {said}" for said in problems))
    return chosen


def _empty_words(infos: Sequence[Described], select: Select) -> Iterator[str]:
    """Say of each part, kind, layer range and pattern that matches nothing beside others, what there is."""
    remedy = ". Mend it or take it out (`optional = true` permits it)."
    for part in select.part if len(select.part) > 1 or select.layers else ():
        one = replace(select, part=(part,))
        depth = max((i.layers for i in infos if replace(one, layers="").takes(i)), default=0)
        if select.layers and depth and _reach(select.layers) > depth:
            yield f"it reaches past the {depth} layers that {part!r} has{remedy}"
        elif not any(map(one.takes, infos)):
            yield f"part {part!r} matches nothing. {_what_there_is(infos, one)}{remedy}"
    if select.layers and not select.part:
        depth = max((i.layers for i in infos if select.takes(i)), default=0)
        if _reach(select.layers) > depth:
            yield f"it reaches past the {depth} layers that there are{remedy}"
    for kind in select.kind if len(select.kind) > 1 else ():
        if not any(map(replace(select, kind=(kind,)).takes, infos)):
            there = replace(select, kind=())
            yield f"kind {kind!r} matches nothing. {_what_there_is(infos, there)}{remedy}"
    for pattern in select.pattern if len(select.pattern) > 1 else ():
        if not any(map(replace(select, pattern=(pattern,)).takes, infos)):
            yield f"pattern {pattern!r} matches nothing. {_near_names(infos, pattern)}{remedy}"


def _idle(infos: Sequence[Described], chosen: Sequence[int], rules: Sequence[Rule], index: int) -> str:
    """Explain why a rule takes nothing: earlier rules took it all, or there is nothing of the kind."""
    select = rules[index].select
    takers = sorted({i for info, i in zip(infos, chosen, strict=True) if select.takes(info)})
    if takers:
        named = ", ".join(f"rule {i + 1} ({rules[i].select})" for i in takers)
        return (
            f"is never reached: {named} before it took everything that it selects.\n"
            "Move it up, narrow the earlier rule, or remove it (`optional = true` permits an idle rule)."
        )
    said = [_what_there_is(infos, select), *(_near_names(infos, pattern) for pattern in select.pattern)]
    return "matches nothing.\n" + ". ".join([*said, "`optional = true` permits an idle rule."])


def _what_there_is(infos: Sequence[Described], select: Select) -> str:
    """Return the parts of a policy, and the kinds and layers that the selected ones have."""
    parts = Counter(info.part for info in infos)
    hints = [f"This policy has the parts: {', '.join(f'{p} ({n} tensors)' for p, n in parts.items())}"]
    inside = [i for i in infos if not select.part or i.part in select.part]
    if inside and (select.kind or select.part):
        hints.append(f"Kinds there: {', '.join(sorted({i.kind for i in inside}))}")
    if inside and select.layers:
        depths = {i.part: i.layers for i in inside if i.layer is not None}
        hints.append(f"Layers there: {', '.join(f'{p} {n}' for p, n in depths.items()) or 'none'}")
    return ". ".join(hints)


def _near_names(infos: Sequence[Described], pattern: str) -> str:
    """Return the names of parameters that are nearest to a pattern's text, its wildcards left out."""
    names = [info.name for info in infos]
    near = difflib.get_close_matches(WILDCARDS.sub("", pattern), names, n=NEAR_NAMES, cutoff=0.5)
    if not near:
        return (
            f"No parameter's name is near; the first is {names[0]!r}" if names else "There are no parameters"
        )
    return f"The nearest names are {', '.join(map(repr, near))}"
