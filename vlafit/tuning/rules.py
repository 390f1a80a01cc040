"""A tuning strategy: an ordered list of rules that says, for every parameter, whether and how it learns.

A strategy is a TOML file (the shipped ones are in configs/strategies/):

    purpose = "Train the action expert; the vision-language backbone stays as it is."

    [[rule]]
    select = { part = ["expert", "projections"], layers = "last 6" }
    mode = "full"
    lr = 0.5                # times the recipe's learning rate

    [[rule]]                # no `select`: everything that is left
    mode = "frozen"

The first rule that selects a parameter decides about it. A parameter that no rule selects, a rule that
selects nothing, and a rule to which earlier rules leave nothing are errors; `optional = true` permits such an
idle rule, so that one file serves every family of policies.

This file knows names, parts, kinds and layers, not tensors: what happens to a policy is `vlafit.tuning.plan`.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from vlafit import config, shipped
from vlafit.errors import StrategyError, did_you_mean

if TYPE_CHECKING:
    from vlafit.nn.policy import ParameterInfo

PARTS = ("vision", "projector", "language", "expert", "projections")
KINDS = ("attention", "mlp", "norm", "embedding", "conv", "linear")
Mode = Literal["full", "frozen"]
MODES: tuple[Mode, ...] = get_args(Mode)

LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<low>\d+)(?:-(?P<high>\d+))?")


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

    def takes(self, info: "ParameterInfo") -> bool:
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
    mode: Mode = "full"
    """"full": they learn. "frozen": they stay bit for bit what they are."""
    lr: float = 1.0
    """Learning rate, times the recipe's."""
    weight_decay: float | None = None
    """Weight decay of this rule's matrices instead of the recipe's."""
    optional: bool = False
    """Permit that the rule takes nothing."""


@dataclass(frozen=True)
class Strategy:
    """An ordered list of rules with a name."""

    name: str
    rules: tuple[Rule, ...]
    purpose: str = ""


def load_strategy(name_or_path: str) -> Strategy:
    """Read a strategy: a path, or the name of one that ships.

    Raises ConfigError when there is no such file or it is no TOML, StrategyError when it is no strategy.
    """
    path = shipped.find("strategy", name_or_path)
    values = config.load_toml(path, "strategy")
    for key in values:
        if key not in ("purpose", "rule"):
            raise StrategyError(f"{path}: unknown key {key!r}{did_you_mean(key, ('purpose', 'rule'))}")
    purpose, rules = values.get("purpose", ""), values.get("rule", [])
    if not isinstance(purpose, str):
        raise StrategyError(f"{path}: `purpose` is one sentence of text, not {purpose!r}")
    if not isinstance(rules, list):
        raise StrategyError(f"{path}: write each rule as [[rule]], with double brackets")
    return parse(rules, name=Path(path).stem, where=str(path), purpose=purpose)


def parse(rules: Sequence[Mapping[str, object]], *, name: str, where: str, purpose: str = "") -> Strategy:
    """Build a strategy from rule tables; `where` stands in front of every error message.

    Raises StrategyError naming the rule, the key and what it can be.
    """
    if not rules:
        raise StrategyError(f"{where}: the strategy has no rule; write at least one [[rule]] with a `mode`")
    return Strategy(name, tuple(_rule(r, f"{where}: rule {i}") for i, r in enumerate(rules, 1)), purpose)


def _rule(values: Mapping[str, object], where: str) -> Rule:
    if not isinstance(values, Mapping):
        raise StrategyError(f"{where}: a rule is a table, not {values!r}")
    _only(values, ("select", "mode", "lr", "weight_decay", "optional"), where)
    if "mode" not in values:
        raise StrategyError(f"{where}: `mode` is missing; it can be one of: {', '.join(MODES)}")
    mode = values["mode"]
    if mode not in MODES:
        raise StrategyError(f"{where}: unknown mode {mode!r}{did_you_mean(str(mode), MODES)}")
    select = values.get("select", {})
    if not isinstance(select, Mapping):
        raise StrategyError(f'{where}: `select` is a table such as {{ part = "vision" }}, not {select!r}')
    _only(select, ("part", "kind", "layers", "pattern"), f"{where}, select")
    for key in ("lr", "weight_decay"):
        if mode == "frozen" and key in values:
            raise StrategyError(f"{where}: `{key}` means nothing for frozen parameters; remove it")
    optional = values.get("optional", False)
    if not isinstance(optional, bool):
        raise StrategyError(f"{where}: `optional` is true or false, not {optional!r}")
    lr = _number(values.get("lr", 1.0), "lr", where)
    if lr <= 0:
        raise StrategyError(
            f'{where}: `lr` multiplies the learning rate and is above 0; to train nothing, mode = "frozen"'
        )
    decay = values.get("weight_decay")
    return Rule(
        select=Select(
            part=_words(select.get("part", ()), "part", PARTS, where),
            kind=_words(select.get("kind", ()), "kind", KINDS, where),
            layers=_layers(select.get("layers", ""), where),
            pattern=_words(select.get("pattern", ()), "pattern", (), where),
        ),
        mode=cast(Mode, mode),
        lr=lr,
        weight_decay=None if decay is None else _number(decay, "weight_decay", where),
        optional=optional,
    )


def _only(values: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise StrategyError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise StrategyError(f"{where}: `{key}` is a number from 0 on, not {value!r}")
    return float(value)


def _words(value: object, key: str, known: Sequence[str], where: str) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(w, str) and w for w in words):
        raise StrategyError(f"{where}: `{key}` is a text or a list of texts, not {value!r}")
    for word in words:
        if known and word not in known:
            raise StrategyError(f"{where}: there is no {key} {word!r}{did_you_mean(word, known)}")
    return tuple(words)


def _layers(value: object, where: str) -> str:
    match = LAYERS.fullmatch(value) if isinstance(value, str) else None
    if value == "":
        return ""
    if not match or (match["high"] and int(match["high"]) < int(match["low"])):
        raise StrategyError(
            f"{where}: `layers` = {value!r} is no range; "
            'write "first 3", "last 2", "4" or "4-7" (counted from 0)'
        )
    return match.string


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


def resolve(infos: "Sequence[ParameterInfo]", strategy: Strategy) -> list[int]:
    """Return, for each parameter, the index of the rule that decides about it.

    Raises StrategyError for a parameter without a rule, and for an idle rule that is not optional.
    """
    chosen = [next((i for i, r in enumerate(strategy.rules) if r.select.takes(info)), -1) for info in infos]
    bare = [info for info, index in zip(infos, chosen, strict=True) if index < 0]
    if bare:
        groups = Counter(f"{info.part}, {info.kind}" for info in bare)
        listed = "\n  ".join(
            f"{what}: {count} tensors, such as {next(i.name for i in bare if f'{i.part}, {i.kind}' == what)}"
            for what, count in groups.items()
        )
        raise StrategyError(
            f"strategy {strategy.name!r} says nothing about {len(bare)} of {len(infos)} tensors:\n"
            f"  {listed}\n"
            'Add a rule for them; a last [[rule]] with mode = "frozen" and no `select` covers what is left.'
        )
    used = set(chosen)
    for index, rule in enumerate(strategy.rules):
        if index not in used and not rule.optional:
            raise StrategyError(_idle(infos, chosen, strategy, index))
    return chosen


def _idle(infos: "Sequence[ParameterInfo]", chosen: Sequence[int], strategy: Strategy, index: int) -> str:
    """Explain why a rule takes nothing: earlier rules took it all, or there is nothing of the kind."""
    rule = strategy.rules[index]
    here = f"strategy {strategy.name!r}: rule {index + 1} ({rule.select}; {rule.mode})"
    takers = sorted({i for info, i in zip(infos, chosen, strict=True) if rule.select.takes(info)})
    if takers:
        named = ", ".join(f"rule {i + 1} ({strategy.rules[i].select})" for i in takers)
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
