"""A strategy as the tables that its TOML has: what a plan keeps of it, and what reads back as the same."""

from collections.abc import Iterator
from dataclasses import asdict

from vlafit.tuning import adapters
from vlafit.tuning.rules import Rule
from vlafit.tuning.strategy import Stage, Strategy


def plain(strategy: Strategy) -> dict[str, object]:
    """Return the strategy as the tables that `parse` reads, its name beside them."""
    said: dict[str, object] = {"name": strategy.name, "purpose": strategy.purpose}
    if len(strategy.stages) == 1 and strategy.stages[0] == Stage(strategy.rules):
        return said | {"rule": [dict(_plain_rule(r)) for r in strategy.rules]}
    return said | {"stage": [dict(_plain_stage(s)) for s in strategy.stages]}


def _plain_stage(stage: Stage) -> Iterator[tuple[str, object]]:
    default = Stage(())
    for key in ("name", "lr", "warmup_steps", "layer_by_layer"):
        if getattr(stage, key) != getattr(default, key):
            yield key, getattr(stage, key)
    for key in ("begin", "every"):
        moment = getattr(stage, key)
        if moment is not None:
            yield key, {k: v for k, v in asdict(moment).items() if v is not None}
    yield "rule", [dict(_plain_rule(r)) for r in stage.rules]


def _plain_rule(rule: Rule) -> Iterator[tuple[str, object]]:
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
