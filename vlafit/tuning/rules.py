"""The rules of a tuning strategy: match parameters to rules, first match wins.

These are errors: a parameter that no rule selects, a rule that selects nothing or only what earlier rules
took, and a part, kind, pattern or layer that the policy does not have. `optional = true` permits all but the
first, so that one file serves every family. A rule for everything else may find nothing left, where earlier
rules name what the policy has. Part names are those that the policy declares.

This file knows names, parts, kinds and layers, not tensors. `strategy_toml.py` reads rules from TOML,
`plan.py` turns them into a plan for one policy.
"""

import difflib
import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from vlafit import shipped
from vlafit.errors import StrategyError, did_you_mean
from vlafit.tuning.adapters import METHODS, Adapter, Quantise

log = logging.getLogger(__name__)

MODES = ("full", "frozen", *METHODS)

LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<low>\d+)(?:-(?P<high>\d+))?")
TOP = "top"
"""As a layer range: the layers that a stage with `layer_by_layer` has reached, from the top."""
USUAL = ("vision", "projector", "language", "expert", "projections")
"""Parts that the shipped strategies name: no misspellings, whatever a policy has."""
WILDCARDS = re.compile(r"[*?]|\[[^\]]*\]")
NEAR_NAMES = 3  # that a message shows for a pattern


class Described(Protocol):
    """Where a parameter sits; `vlafit.nn.policy.ParameterInfo` is one."""

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
    """Which parameters a rule selects. All conditions that are set must hold; without any it selects all."""

    part: tuple[str, ...] = ()
    """Parts of the policy, by the names that its family declares; pi0's are vision, language, expert, ..."""
    kind: tuple[str, ...] = ()
    """Kinds inside a part: attention, mlp, norm, embedding, conv, linear."""
    layers: str = ""
    """Layers of each part, counted from 0: "4", "4-7" (both included), "first 3" or "last 2"."""
    pattern: tuple[str, ...] = ()
    """Whole parameter names with wildcards, as in "expert.layers.*.mlp.*". Prefer part and kind."""

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
    """How to tune the parameters that `select` matches and no earlier rule matched."""

    select: Select = Select()
    """Which parameters."""
    mode: str = "full"
    """"full": trained. "frozen": unchanged, bit for bit. Otherwise the method of a trained adapter."""
    adapter: Adapter | None = None
    """The adapter and its options, if `mode` names a method."""
    lr: float = 1.0
    """Learning rate, times the recipe's."""
    layer_decay: float = 1.0
    """Learning rate of each layer relative to the layer above it."""
    weight_decay: float | None = None
    """Weight decay of this rule's matrices. None: the recipe's."""
    quantise: Quantise = ""
    """Store the frozen weights in 4 bits ("nf4") or 8 bits ("int8"), with or without an adapter on them."""
    optional: bool = field(default=False, compare=False)
    """Allow the rule to select nothing. It changes no plan, so it is not compared."""

    def lr_at(self, info: Described) -> float:
        """Return the learning rate of a parameter, times the recipe's.

        Tensors before the first layer (an embedding) count as one layer below it, those after the last layer
        (a final norm) as part of the last.
        """
        if info.layer is None:
            below = info.layers if info.kind in ("embedding", "conv") else 0
        else:
            below = info.layers - 1 - info.layer
        return self.lr * self.layer_decay**below


def _in_layers(layers: str, layer: int | None, count: int) -> bool:
    """Tell whether `layer`, of a part with `count`, is in the range; None never is."""
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
    """Return how many layers a part needs for the range to fit in it."""
    match = LAYERS.fullmatch(layers)
    assert match, layers
    return int(match["count"] or 0) or int(match["high"] or match["low"]) + 1


def decide(infos: Sequence[Described], rules: Sequence[Rule], name: str) -> list[int]:
    """Return, for each parameter, the index of the rule that decides about it; `name` is the strategy's.

    Raises StrategyError for a parameter without a rule. `resolve` also checks the rules themselves; a plan
    that was accepted once is not checked again.
    """
    chosen = [next((i for i, r in enumerate(rules) if r.select.takes(info)), -1) for info in infos]
    uncovered = [info for info, index in zip(infos, chosen, strict=True) if index < 0]
    if uncovered:
        groups: dict[str, list[str]] = {}
        for info in uncovered:
            groups.setdefault(f"{info.part}, {info.kind}", []).append(info.name)
        listed = "\n  ".join(
            f"{group}: {len(names)} tensors, such as {names[0]}" for group, names in groups.items()
        )
        raise StrategyError(
            f"strategy {name!r} has no rule for {len(uncovered)} of {len(infos)} tensors:\n"
            f"  {listed}\n"
            'Add a rule for them; a last [[rule]] with mode = "frozen" and no `select` covers the rest.'
        )
    return chosen


def resolve(infos: Sequence[Described], rules: Sequence[Rule], name: str) -> list[int]:
    """Return the same as `decide`, after checking every rule that is not optional.

    Raises StrategyError for a parameter without a rule, and one that lists all of: parts that the policy does
    not have; rules that select nothing (the first for everything else may); parts, kinds, layers and patterns
    that match nothing while others in the same rule do.
    """
    chosen = decide(infos, rules, name)
    problems: list[str] = []
    for index, rule in enumerate(rules):
        here = f"rule {index + 1} ({rule.select}; {rule.mode})"
        unknown = [f"{here}: {problem}" for problem in _unknown_parts(infos, rule)]
        if rule.optional:
            for warning in unknown:
                log.warning("strategy %r: %s", name, warning)
        elif unknown:
            problems += unknown
        elif index in chosen or (rule.select == Select() and rule.mode == "frozen"):
            problems += [f"{here}: {problem}" for problem in _unmatched(infos, rule.select)]
        elif rule.select == Select() and all(before.select != Select() for before in rules[:index]):
            log.info("strategy %r: %s finds nothing left: the rules before it name all of it", name, here)
        else:
            problems.append(f"{here} {_idle(infos, chosen, rules, index)}")
    if problems:
        lines = [f"strategy {name!r}: {problem}" for problem in problems]
        raise StrategyError("\n".join([*lines, *_ways_out(name)]))
    return chosen


def _ways_out(name: str) -> Iterator[str]:
    """Say how to change a strategy that ships: it is copied first."""
    if name in shipped.names("strategy"):
        path = shipped.find("strategy", f"{name}.toml")
        yield (
            f"If this is the strategy that ships: copy {path} to my-{name}.toml, change the rules there, and "
            f"name that file as the strategy"
        )


def _unknown_parts(infos: Sequence[Described], rule: Rule) -> Iterator[str]:
    """Describe each part that the policy does not have; for an optional rule, only likely typos."""
    parts = {info.part for info in infos}
    for part in rule.select.part:
        if rule.optional and part in USUAL:
            continue
        near = did_you_mean(part, parts, listed=not rule.optional)
        if part not in parts and (near or not rule.optional):
            yield f"this policy has no part {part!r}{near}"


def _unmatched(infos: Sequence[Described], select: Select) -> Iterator[str]:
    """Describe each part, kind, layer range and pattern that matches nothing while others in the rule do."""
    remedy = ". Correct or remove it (`optional = true` in the rule permits it)."
    for part in select.part if len(select.part) > 1 or select.layers else ():
        only = replace(select, part=(part,))
        depth = max((i.layers for i in infos if replace(only, layers="").takes(i)), default=0)
        if select.layers and depth and _reach(select.layers) > depth:
            yield f"layers {select.layers!r} goes past the {depth} layers that {part!r} has{remedy}"
        elif not any(map(only.takes, infos)):
            yield f"{_lack(infos, only)}. {_available(infos, Select())}{remedy}"
    if select.layers and not select.part:
        depth = max((i.layers for i in infos if select.takes(i)), default=0)
        if _reach(select.layers) > depth:
            yield f"layers {select.layers!r} goes past the {depth} layers of this policy{remedy}"
    for kind in select.kind if len(select.kind) > 1 else ():
        if not any(map(replace(select, kind=(kind,)).takes, infos)):
            yield f"{_lack(infos, replace(select, kind=(kind,)))}{remedy}"
    for pattern in select.pattern if len(select.pattern) > 1 else ():
        if not any(map(replace(select, pattern=(pattern,)).takes, infos)):
            yield f"pattern {pattern!r} matches nothing. {_near_names(infos, pattern)}{remedy}"


def _idle(infos: Sequence[Described], chosen: Sequence[int], rules: Sequence[Rule], index: int) -> str:
    """Explain why a rule selects nothing: earlier rules matched it all, or the policy has no such tensor."""
    select = rules[index].select
    earlier = sorted({i for info, i in zip(infos, chosen, strict=True) if select.takes(info)})
    if earlier:
        listed = ", ".join(f"rule {i + 1} ({rules[i].select})" for i in earlier)
        return (
            f"is never used: everything it selects is already matched by {listed}.\n"
            "Move it up, narrow the earlier rule, or remove it (`optional = true` permits an unused rule)."
        )
    lacks = [_lack(infos, select)] if select.kind or select.layers else []
    hints = [*lacks, _available(infos, select), *(_near_names(infos, pattern) for pattern in select.pattern)]
    return "matches nothing.\n" + ". ".join([*hints, "`optional = true` permits an unused rule."])


def _lack(infos: Sequence[Described], select: Select) -> str:
    """Say what of kinds, layers and patterns the selected parts do not have, and what they have."""
    inside = [info for info in infos if not select.part or info.part in select.part]
    several = len(select.part) > 1
    where = (
        f"{'parts' if several else 'part'} {', '.join(map(repr, select.part))}"
        if select.part
        else "this policy"
    )
    words = [f"of kind {' or '.join(select.kind)}"] if select.kind else []
    words += [f"in layers {select.layers}"] if select.layers else []
    words += [f"named {' or '.join(select.pattern)}"] if select.pattern else []
    kinds = ", ".join(sorted({info.kind for info in inside}))
    depths = {info.part: info.layers for info in inside if info.layer is not None}
    layers = ", ".join(f"{part} {depth}" for part, depth in depths.items()) or "none"
    has = [
        *([f"kinds there: {kinds}"] if select.kind else []),
        *([f"layers there: {layers}"] if select.layers else []),
    ]
    return f"{where} {'have' if several else 'has'} no parameters {' and '.join(words)}" + (
        f" ({'; '.join(has)})" if has else ""
    )


def _available(infos: Sequence[Described], select: Select) -> str:
    """Describe the parts of a policy, and the kinds and layers of the selected parts."""
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
    """Describe the parameter names nearest to a pattern, ignoring its wildcards."""
    names = [info.name for info in infos]
    near = difflib.get_close_matches(WILDCARDS.sub("", pattern), names, n=NEAR_NAMES, cutoff=0.5)
    if not near:
        return (
            f"No parameter has a similar name; the first is {names[0]!r}"
            if names
            else "There are no parameters"
        )
    return f"The nearest names are {', '.join(map(repr, near))}"
