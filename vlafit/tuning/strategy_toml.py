"""Read and write tuning strategies as TOML tables.

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

A stage with `layer_by_layer = 2` and `every = { fraction = 0.1 }` is repeated with two more layers each time;
`layers = "top"` in its rules selects the layers reached so far, from the top.

`stop_gradient = "prefix"`, beside `purpose` or in a stage, is knowledge insulation (arXiv 2505.23705): the
loss of the actions leaves no gradient in the pass over images and prompt.

Any part name is accepted here: parts belong to the policy, and applying the strategy checks them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from vlafit import config, shipped
from vlafit.errors import StrategyError, did_you_mean
from vlafit.nn.kinds import KINDS
from vlafit.tuning import adapters
from vlafit.tuning.rules import LAYERS, MODES, TOP, Rule, Select
from vlafit.tuning.strategy import Moment, Stage, StopGradient, Strategy, require_order

COMMON = ("select", "mode", "lr", "layer_decay", "weight_decay", "quantise", "optional")
RANGES = 'write "first 3", "last 2", "4" or "4-7" (counted from 0)'
STAGE_KEYS = ("name", "begin", "lr", "warmup_steps", "layer_by_layer", "every", "stop_gradient", "rule")
KEYS = ("purpose", "stop_gradient", "rule", "stage")


def load_strategy(name_or_path: str) -> Strategy:
    """Read a strategy: a path, or the name of a shipped one.

    Raises ConfigError when the file is missing or not TOML, StrategyError when it is not a valid strategy.
    """
    path = shipped.find("strategy", name_or_path)
    return parse(config.load_toml(path, "strategy"), name=Path(path).stem, where=str(path))


def parse(
    values: Mapping[str, object] | Sequence[Mapping[str, object]], *, name: str, where: str
) -> Strategy:
    """Build a strategy from its TOML tables, or from a list of rule tables.

    `where` prefixes every error message. Raises StrategyError naming the stage, the rule, the key and its
    valid values.
    """
    if not isinstance(values, Mapping):
        values = {"rule": list(values)}
    for key in values:
        if key not in KEYS:
            raise StrategyError(f"{where}: unknown key {key!r}{did_you_mean(key, KEYS)}")
    purpose = values.get("purpose", "")
    if not isinstance(purpose, str):
        raise StrategyError(f"{where}: `purpose` must be a string, not {purpose!r}")
    if "stage" not in values:
        rules = _rules(values.get("rule", []), where)
        for number, rule in enumerate(rules, 1):
            if rule.select.layers == TOP:
                raise StrategyError(
                    f'{where}: rule {number}: `layers = "top"` only works in a stage with `layer_by_layer`; '
                    f"here {RANGES}"
                )
        stage = Stage(rules, stop_gradient=_stop_gradient(values, where))
        return Strategy(name, (stage,), purpose)
    if "rule" in values:
        raise StrategyError(f"{where}: with stages, write rules as [[stage.rule]], not [[rule]]")
    if "stop_gradient" in values:
        raise StrategyError(f"{where}: with stages, write `stop_gradient` in each [[stage]] that needs it")
    tables = values["stage"]
    if not isinstance(tables, list) or not tables:
        raise StrategyError(f"{where}: write each stage as [[stage]], with double brackets")
    stages = tuple(_stage(table, i, f"{where}: stage {i + 1}") for i, table in enumerate(tables))
    require_order(stages, where)
    return Strategy(name, stages, purpose)


def _stage(values: object, index: int, where: str) -> Stage:
    if not isinstance(values, Mapping):
        raise StrategyError(f"{where}: write each stage as [[stage]], with double brackets")
    _only(values, STAGE_KEYS, where)
    name = values.get("name", "")
    if not isinstance(name, str):
        raise StrategyError(f"{where}: `name` must be a string, not {name!r}")
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
        raise StrategyError(
            f"{where}: `layer_by_layer` must be a number of layers of at least 1, not {layers!r}"
        )
    every = _moment(values["every"], "every", where) if "every" in values else None
    if bool(layers) != (every is not None):
        raise StrategyError(f"{where}: `layer_by_layer` and `every` must be used together")
    warmup = values.get("warmup_steps", 0)
    if type(warmup) is not int or warmup < 0 or (warmup and index == 0):
        first = "; the first stage uses the recipe's optim.warmup_steps" if index == 0 else ""
        raise StrategyError(
            f"{where}: `warmup_steps` must be a whole number of at least 0, not {warmup!r}{first}"
        )
    rules = _rules(values.get("rule", []), where)
    tops = [rule for rule in rules if rule.select.layers == TOP]
    if bool(tops) != bool(layers):
        raise StrategyError(f'{where}: `layers = "top"` and `layer_by_layer` must be used together')
    return Stage(
        rules,
        name,
        begin,
        _above(values.get("lr", 1.0), "lr", where),
        warmup,
        layer_by_layer=layers,
        every=every,
        stop_gradient=_stop_gradient(values, where),
    )


def _stop_gradient(values: Mapping[str, object], where: str) -> StopGradient:
    value = values.get("stop_gradient", "")
    if value not in ("", "prefix"):
        raise StrategyError(f'{where}: `stop_gradient` must be "prefix" or empty, not {value!r}')
    return cast(StopGradient, value)


def _moment(values: object, key: str, where: str) -> Moment:
    kinds = ("step", "fraction", "plateau")
    if not isinstance(values, Mapping) or len(values) != 1:
        raise StrategyError(
            f"{where}: `{key}` must be one of {{ step = 500 }}, {{ fraction = 0.25 }}, {{ plateau = 2 }}"
        )
    _only(values, kinds, f"{where}, {key}")
    ((kind, value),) = values.items()
    if kind == "fraction":
        if type(value) not in (int, float) or not 0 < value < 1:
            raise StrategyError(f"{where}: a fraction must be between 0 and 1, not {value!r}")
        return Moment(fraction=float(value))
    if type(value) is not int or value < 1:
        raise StrategyError(f"{where}: `{kind}` must be a whole number of at least 1, not {value!r}")
    return Moment(step=value) if kind == "step" else Moment(plateau=value)


def _rules(rules: object, where: str) -> tuple[Rule, ...]:
    if not isinstance(rules, list):
        raise StrategyError(f"{where}: write each rule as [[rule]], with double brackets")
    if not rules:
        raise StrategyError(f"{where}: the strategy has no rule; write at least one [[rule]] with a `mode`")
    return tuple(_rule(rule, f"{where}: rule {i}") for i, rule in enumerate(rules, 1))


def _rule(values: object, where: str) -> Rule:
    if not isinstance(values, Mapping):
        raise StrategyError(f"{where}: a rule must be a table, not {values!r}")
    mode = values.get("mode")
    _only(values, (*COMMON, *adapters.KEYS), where)
    if mode is None:
        raise StrategyError(f"{where}: `mode` is missing; it can be one of: {', '.join(MODES)}")
    if mode not in MODES:
        raise StrategyError(f"{where}: unknown mode {mode!r}{did_you_mean(str(mode), MODES)}")
    options = {key: value for key, value in values.items() if key in adapters.KEYS}
    if mode in ("full", "frozen") and options:
        raise StrategyError(
            f"{where}: `{next(iter(options))}` is an adapter option; mode {mode!r} does not use adapters"
        )
    select = values.get("select", {})
    if not isinstance(select, Mapping):
        raise StrategyError(
            f'{where}: `select` must be a table such as {{ part = "vision" }}, not {select!r}'
        )
    _only(select, ("part", "kind", "layers", "pattern"), f"{where}, select")
    for key in ("lr", "layer_decay", "weight_decay"):
        if mode == "frozen" and key in values:
            raise StrategyError(f"{where}: `{key}` has no effect on frozen parameters; remove it")
    optional = values.get("optional", False)
    if not isinstance(optional, bool):
        raise StrategyError(f"{where}: `optional` must be true or false, not {optional!r}")
    decay = values.get("weight_decay")
    layer_decay = _above(values.get("layer_decay", 1.0), "layer_decay", where)
    if layer_decay > 1:
        raise StrategyError(
            f"{where}: `layer_decay` must be at most 1, not {layer_decay}: lower layers get lower learning "
            "rates"
        )
    quantise = values.get("quantise", "")
    if quantise not in adapters.QUANTISE:
        near = did_you_mean(str(quantise), [q for q in adapters.QUANTISE if q])
        raise StrategyError(f"{where}: unknown `quantise` {quantise!r}{near}")
    if quantise and mode not in ("frozen", "lora"):
        raise StrategyError(f"{where}: `quantise` only works with mode frozen or lora, not with {mode}")
    if quantise and options.get("init") == "pissa":
        raise StrategyError(
            f"{where}: init = 'pissa' changes the base weight, which `quantise` rounds; use only one of them"
        )
    return Rule(
        select=Select(
            part=_words(select.get("part", ()), "part", (), where),
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
        raise StrategyError(f"{where}: `{key}` must be a number of at least 0, not {value!r}")
    return float(value)


def _above(value: object, key: str, where: str) -> float:
    number = _number(value, key, where)
    if number <= 0:
        raise StrategyError(
            f"{where}: `{key}` multiplies the learning rate and must be above 0, not {value!r}; to train "
            'nothing, use mode = "frozen"'
        )
    return number


def _words(value: object, key: str, known: Sequence[str], where: str) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if (
        not isinstance(words, list | tuple)
        or words == []  # which would take everything
        or not all(isinstance(w, str) and w for w in words)
    ):
        raise StrategyError(f"{where}: `{key}` must be a string or a list of strings, not {value!r}")
    for word in words:
        if known and word not in known:
            raise StrategyError(f"{where}: unknown {key} {word!r}{did_you_mean(word, known)}")
    return tuple(words)


def _layers(value: object, where: str) -> str:
    if value in ("", TOP):
        return str(value)
    match = LAYERS.fullmatch(value) if isinstance(value, str) else None
    if not match or (match["high"] and int(match["high"]) < int(match["low"])):
        raise StrategyError(f"{where}: `layers` = {value!r} is not a range; {RANGES}")
    return match.string


# ------------------------------------------------------------------------------------------------- writing


def to_tables(strategy: Strategy) -> dict[str, object]:
    """Return the strategy as the tables that `parse` reads, with its name added."""
    header: dict[str, object] = {"name": strategy.name, "purpose": strategy.purpose}
    stop = strategy.stages[0].stop_gradient
    if len(strategy.stages) == 1 and strategy.stages[0] == Stage(strategy.rules, stop_gradient=stop):
        own = {"stop_gradient": stop} if stop else {}
        return header | own | {"rule": [dict(_rule_table(r)) for r in strategy.rules]}
    return header | {"stage": [dict(_stage_table(s)) for s in strategy.stages]}


def _stage_table(stage: Stage) -> Iterator[tuple[str, object]]:
    default = Stage(())
    for key in ("name", "lr", "warmup_steps", "layer_by_layer", "stop_gradient"):
        if getattr(stage, key) != getattr(default, key):
            yield key, getattr(stage, key)
    for key in ("begin", "every"):
        moment = getattr(stage, key)
        if moment is not None:
            yield key, {k: v for k, v in asdict(moment).items() if v is not None}
    yield "rule", [dict(_rule_table(r)) for r in stage.rules]


def _rule_table(rule: Rule) -> Iterator[tuple[str, object]]:
    select = {key: value for key, value in asdict(rule.select).items() if value}
    if select:
        yield "select", {k: v if isinstance(v, str) else list(v) for k, v in select.items()}
    yield "mode", rule.mode
    if rule.adapter is not None:
        yield from adapters.plain(rule.adapter).items()
    default = Rule()
    for key in ("lr", "layer_decay", "weight_decay", "quantise", "optional"):
        if getattr(rule, key) != getattr(default, key):
            yield key, getattr(rule, key)
