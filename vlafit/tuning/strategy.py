"""A tuning strategy: rules in order, for the whole run or stage by stage. This file is how it is written.

A strategy is a TOML file (the shipped ones are in configs/strategies/):

    purpose = "Adapt the language model, train the action expert; the image tower stays as it is."

    [[rule]]
    select = { part = "language", kind = ["attention", "mlp"] }
    mode = "lora"
    rank = 16

    [[rule]]
    select = { part = "expert", layers = "last 6" }
    mode = "full"
    lr = 0.5                # times the recipe's learning rate

    [[rule]]                # no `select`: everything that is left
    mode = "frozen"

Progressive unfreezing is a list of stages, each with its rules and the moment it begins:

    [[stage]]
    name = "probe"
    [[stage.rule]]
    select = { part = "projections" }
    mode = "full"
    [[stage.rule]]
    mode = "frozen"

    [[stage]]
    name = "all"
    begin = { fraction = 0.25 }     # of the run's steps; or { step = 500 }, or { plateau = 2 }
    warmup_steps = 20
    lr = 0.5                        # times the recipe's, for all rules of the stage
    [[stage.rule]]
    mode = "full"

A stage with `layer_by_layer = 2` and `every = { fraction = 0.1 }` is repeated with two more layers each time:
`layers = "top"` in its rules stands for those reached, from the top.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from vlafit import config, shipped
from vlafit.errors import StrategyError, did_you_mean
from vlafit.tuning import adapters
from vlafit.tuning.rules import KINDS, LAYERS, MODES, PARTS, TOP, Described, Rule, Select

COMMON = ("select", "mode", "lr", "layer_decay", "weight_decay", "quantise", "optional")
RANGES = 'write "first 3", "last 2", "4" or "4-7" (counted from 0)'
STAGE_KEYS = ("name", "begin", "lr", "warmup_steps", "layer_by_layer", "every", "rule")


@dataclass(frozen=True)
class Moment:
    """When a stage begins: exactly one of the three is set."""

    step: int | None = None
    """After so many optimiser steps."""
    fraction: float | None = None
    """After this share of the run's steps."""
    plateau: int | None = None
    """After so many validations in a row without a new lowest loss, counted since the stage before began."""

    def at_step(self, steps: int) -> int | None:
        """Return the first step of the stage in a run of `steps`; None where validation decides."""
        if self.step is not None:
            return self.step
        return None if self.fraction is None else round(self.fraction * steps)

    def __str__(self) -> str:
        """Return the moment in words."""
        if self.step is not None:
            return f"step {self.step}"
        if self.fraction is not None:
            return f"{self.fraction:.0%} of the steps"
        return f"{self.plateau} validations without a lower loss"


@dataclass(frozen=True)
class Stage:
    """The rules of one stretch of a run."""

    rules: tuple[Rule, ...]
    name: str = ""
    begin: Moment | None = None
    """None: with the run's first step."""
    lr: float = 1.0
    """Learning rate of all its rules, times the recipe's."""
    warmup_steps: int = 0
    """Steps of linear warm-up when it begins. The first stage has the recipe's."""
    layer_by_layer: int = 0
    """Layers that each repetition of the stage adds, from the top; 0: it is no such stage."""
    every: Moment | None = None
    """When the next repetition begins, counted from the one before."""


@dataclass(frozen=True)
class Strategy:
    """Stages with a name; one stage, from the first step on, is the usual case."""

    name: str
    stages: tuple[Stage, ...]
    purpose: str = ""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the first stage."""
        return self.stages[0].rules

    def expand(self, infos: Sequence[Described]) -> "Strategy":
        """Return the strategy with each layer-by-layer stage written out for a policy of these parameters.

        Raises StrategyError when such a stage's rules name no part, or one that has no layers.
        """
        if not any(stage.layer_by_layer for stage in self.stages):
            return self
        written: list[Stage] = []
        for number, stage in enumerate(self.stages, 1):
            written += _repeated(stage, infos, f"strategy {self.name!r}: stage {number}")
        _require_order(written, f"strategy {self.name!r}")
        return replace(self, stages=tuple(written))


def _repeated(stage: Stage, infos: Sequence[Described], where: str) -> list[Stage]:
    if not stage.layer_by_layer:
        return [stage]
    parts = {p for rule in stage.rules if rule.select.layers == TOP for p in rule.select.part}
    depths = {part: max((i.layers for i in infos if i.part == part), default=0) for part in sorted(parts)}
    flat = [part for part, depth in depths.items() if not depth]
    if flat or not depths:
        raise StrategyError(
            f"{where}: `layer_by_layer` finds no layers in {', '.join(flat) or 'no part'}; give "
            'the rules with `layers = "top"` a `part` that has layers'
        )
    depth = max(depths.values())
    made = []
    for reached in range(stage.layer_by_layer, depth + stage.layer_by_layer, stage.layer_by_layer):
        reached = min(reached, depth)
        rules = tuple(one for rule in stage.rules for one in _reaching(rule, reached, depths))
        name = f"{stage.name or 'layers'}, top {reached}"
        begin = stage.begin if not made else _after(made[-1].begin, stage.every, where)
        made.append(replace(stage, rules=rules, name=name, begin=begin, layer_by_layer=0, every=None))
    return made


def _reaching(rule: Rule, reached: int, depths: Mapping[str, int]) -> Iterator[Rule]:
    """Yield the rule with its "top" written out: for all parts, or for each depth that they have."""
    if rule.select.layers != TOP:
        yield rule
        return
    counts = {part: min(reached, depths[part]) for part in rule.select.part}
    for count in dict.fromkeys(counts.values()):
        parts = tuple(part for part in rule.select.part if counts[part] == count)
        yield replace(rule, select=replace(rule.select, part=parts, layers=f"last {count}"))


def _after(begin: Moment | None, every: Moment | None, where: str) -> Moment:
    """Return the moment one repetition later."""
    assert every is not None
    if every.plateau is not None:
        return every
    begin = begin or (Moment(step=0) if every.step is not None else Moment(fraction=0.0))
    if every.step is not None and begin.step is not None:
        return Moment(step=begin.step + every.step)
    if every.fraction is not None and begin.fraction is not None:
        return Moment(fraction=begin.fraction + every.fraction)
    raise StrategyError(f"{where}: `begin` and `every` must both count steps, or both fractions")


# ------------------------------------------------------------------------------------------------- reading


def load_strategy(name_or_path: str) -> Strategy:
    """Read a strategy: a path, or the name of one that ships.

    Raises ConfigError when there is no such file or it is no TOML, StrategyError when it is no strategy.
    """
    path = shipped.find("strategy", name_or_path)
    return parse(config.load_toml(path, "strategy"), name=Path(path).stem, where=str(path))


def parse(
    values: Mapping[str, object] | Sequence[Mapping[str, object]], *, name: str, where: str
) -> Strategy:
    """Build a strategy from what its TOML says, or from a list of rule tables.

    `where` stands in front of every error message. Raises StrategyError naming the stage, the rule, the key
    and what it can be.
    """
    if not isinstance(values, Mapping):
        values = {"rule": list(values)}
    for key in values:
        if key not in ("purpose", "rule", "stage"):
            raise StrategyError(
                f"{where}: unknown key {key!r}{did_you_mean(key, ('purpose', 'rule', 'stage'))}"
            )
    purpose = values.get("purpose", "")
    if not isinstance(purpose, str):
        raise StrategyError(f"{where}: `purpose` is one sentence of text, not {purpose!r}")
    if "stage" not in values:
        rules = _rules(values.get("rule", []), where)
        for number, rule in enumerate(rules, 1):
            if rule.select.layers == TOP:
                raise StrategyError(
                    f'{where}: rule {number}: `layers = "top"` is for stages with `layer_by_layer`; in a '
                    f"rule of the whole run {RANGES}"
                )
        return Strategy(name, (Stage(rules),), purpose)
    if "rule" in values:
        raise StrategyError(f"{where}: write rules as [[stage.rule]] when there are stages, not as [[rule]]")
    tables = values["stage"]
    if not isinstance(tables, list) or not tables:
        raise StrategyError(f"{where}: write each stage as [[stage]], with double brackets")
    stages = tuple(_stage(table, i, f"{where}: stage {i + 1}") for i, table in enumerate(tables))
    _require_order(stages, where)
    return Strategy(name, stages, purpose)


def _require_order(stages: Sequence[Stage], where: str) -> None:
    """Raise StrategyError where a stage does not begin after the one before it, or only after the run."""
    last: Moment | None = None
    for i, stage in enumerate(stages[1:], 2):
        begin = stage.begin
        assert begin is not None
        for kind in ("step", "fraction"):
            now, before = getattr(begin, kind), getattr(last, kind) if last else 0
            if now is not None and before is not None and now <= before:
                raise StrategyError(f"{where}: stage {i} begins at {begin}, not after the stage before it")
        if begin.fraction is not None and begin.fraction >= 1:
            raise StrategyError(
                f"{where}: stage {i} ({stage.name or 'without a name'}) would begin at {begin}, when the run "
                "is over; let its layers come in larger groups, or sooner (`layer_by_layer`, `every`)"
            )
        last = begin


def _stage(values: object, index: int, where: str) -> Stage:
    if not isinstance(values, Mapping):
        raise StrategyError(f"{where}: write each stage as [[stage]], with double brackets")
    _only(values, STAGE_KEYS, where)
    name = values.get("name", "")
    if not isinstance(name, str):
        raise StrategyError(f"{where}: `name` is text, not {name!r}")
    begin = _moment(values["begin"], "begin", where) if "begin" in values else None
    if (begin is None) != (index == 0):
        raise StrategyError(
            f"{where}: the first stage begins with the run; remove `begin`"
            if index == 0
            else f"{where}: `begin` is missing; write begin = {{ step = 500 }}, {{ fraction = 0.25 }} or "
            "{ plateau = 2 }"
        )
    layers = values.get("layer_by_layer", 0)
    if type(layers) is not int or layers < 0:
        raise StrategyError(f"{where}: `layer_by_layer` is a number of layers from 1 on, not {layers!r}")
    every = _moment(values["every"], "every", where) if "every" in values else None
    if bool(layers) != (every is not None):
        raise StrategyError(f"{where}: `layer_by_layer` and `every` go together")
    warmup = values.get("warmup_steps", 0)
    if type(warmup) is not int or warmup < 0 or (warmup and index == 0):
        first = "; the first stage has the recipe's optim.warmup_steps" if index == 0 else ""
        raise StrategyError(f"{where}: `warmup_steps` is a whole number from 0 on, not {warmup!r}{first}")
    rules = _rules(values.get("rule", []), where)
    tops = [rule for rule in rules if rule.select.layers == TOP]
    if bool(tops) != bool(layers):
        raise StrategyError(f'{where}: `layers = "top"` and `layer_by_layer` go together')
    return Stage(
        rules,
        name,
        begin,
        _above(values.get("lr", 1.0), "lr", where),
        warmup,
        layer_by_layer=layers,
        every=every,
    )


def _moment(values: object, key: str, where: str) -> Moment:
    kinds = ("step", "fraction", "plateau")
    if not isinstance(values, Mapping) or len(values) != 1:
        raise StrategyError(
            f"{where}: `{key}` is one of {{ step = 500 }}, {{ fraction = 0.25 }}, {{ plateau = 2 }}"
        )
    _only(values, kinds, f"{where}, {key}")
    ((kind, value),) = values.items()
    if kind == "fraction":
        if type(value) not in (int, float) or not 0 < value < 1:
            raise StrategyError(f"{where}: a fraction lies between 0 and 1, not {value!r}")
        return Moment(fraction=float(value))
    if type(value) is not int or value < 1:
        raise StrategyError(f"{where}: `{kind}` is a whole number from 1 on, not {value!r}")
    return Moment(step=value) if kind == "step" else Moment(plateau=value)


def _rules(rules: object, where: str) -> tuple[Rule, ...]:
    if not isinstance(rules, list):
        raise StrategyError(f"{where}: write each rule as [[rule]], with double brackets")
    if not rules:
        raise StrategyError(f"{where}: the strategy has no rule; write at least one [[rule]] with a `mode`")
    return tuple(_rule(rule, f"{where}: rule {i}") for i, rule in enumerate(rules, 1))


def _rule(values: object, where: str) -> Rule:
    if not isinstance(values, Mapping):
        raise StrategyError(f"{where}: a rule is a table, not {values!r}")
    mode = values.get("mode")
    _only(values, (*COMMON, *adapters.KEYS), where)
    if mode is None:
        raise StrategyError(f"{where}: `mode` is missing; it can be one of: {', '.join(MODES)}")
    if mode not in MODES:
        raise StrategyError(f"{where}: unknown mode {mode!r}{did_you_mean(str(mode), MODES)}")
    options = {key: value for key, value in values.items() if key in adapters.KEYS}
    if mode in ("full", "frozen") and options:
        raise StrategyError(f"{where}: `{next(iter(options))}` is of adapters; mode {mode!r} has none")
    select = values.get("select", {})
    if not isinstance(select, Mapping):
        raise StrategyError(f'{where}: `select` is a table such as {{ part = "vision" }}, not {select!r}')
    _only(select, ("part", "kind", "layers", "pattern"), f"{where}, select")
    for key in ("lr", "layer_decay", "weight_decay"):
        if mode == "frozen" and key in values:
            raise StrategyError(f"{where}: `{key}` means nothing for frozen parameters; remove it")
    optional = values.get("optional", False)
    if not isinstance(optional, bool):
        raise StrategyError(f"{where}: `optional` is true or false, not {optional!r}")
    decay = values.get("weight_decay")
    layer_decay = _above(values.get("layer_decay", 1.0), "layer_decay", where)
    if layer_decay > 1:
        raise StrategyError(f"{where}: `layer_decay` is at most 1, for upper layers learn faster")
    quantise = values.get("quantise", "")
    if quantise not in adapters.QUANTISE:
        near = did_you_mean(str(quantise), [q for q in adapters.QUANTISE if q])
        raise StrategyError(f"{where}: unknown `quantise` {quantise!r}{near}")
    if quantise and mode not in ("frozen", "lora"):
        raise StrategyError(f"{where}: `quantise` goes with mode frozen or lora, not with {mode}")
    if quantise and options.get("init") == "pissa":
        raise StrategyError(
            f"{where}: PiSSA changes the base weight, which `quantise` rounds; take one of them"
        )
    return Rule(
        select=Select(
            part=_words(select.get("part", ()), "part", PARTS, where),
            kind=_words(select.get("kind", ()), "kind", KINDS, where),
            layers=_layers(select.get("layers", ""), where),
            pattern=_words(select.get("pattern", ()), "pattern", (), where),
        ),
        mode=mode,
        adapter=None if mode in ("full", "frozen") else adapters.build(mode, options, where),
        lr=_above(values.get("lr", 1.0), "lr", where),
        layer_decay=layer_decay,
        weight_decay=None if decay is None else _number(decay, "weight_decay", where),
        quantise=cast(adapters.Quantise, quantise),
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


def _above(value: object, key: str, where: str) -> float:
    number = _number(value, key, where)
    if number <= 0:
        raise StrategyError(
            f'{where}: `{key}` multiplies the learning rate and is above 0; to train nothing, mode = "frozen"'
        )
    return number


def _words(value: object, key: str, known: Sequence[str], where: str) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if (
        not isinstance(words, list | tuple)
        or words == []  # which would take everything
        or not all(isinstance(w, str) and w for w in words)
    ):
        raise StrategyError(f"{where}: `{key}` is a text or a list of texts, not {value!r}")
    for word in words:
        if known and word not in known:
            raise StrategyError(f"{where}: there is no {key} {word!r}{did_you_mean(word, known)}")
    return tuple(words)


def _layers(value: object, where: str) -> str:
    if value in ("", TOP):
        return str(value)
    match = LAYERS.fullmatch(value) if isinstance(value, str) else None
    if not match or (match["high"] and int(match["high"]) < int(match["low"])):
        raise StrategyError(f"{where}: `layers` = {value!r} is no range; {RANGES}")
    return match.string
