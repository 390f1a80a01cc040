"""A strategy resolved against the tensors of one policy, in all of its stages.

Which rule decides about each tensor is worked out once for each stage, here; plans, checks and adapters look
it up. `strict` resolution also refuses rules that take nothing (see `rules.resolve`); a plan that was
accepted before is read back without that check.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlafit.errors import StrategyError
from vlafit.tuning.adapters import Adapter, Quantise
from vlafit.tuning.rules import Described, Rule, decide, resolve
from vlafit.tuning.strategy import Strategy


class Weight(Described, Protocol):
    """A described tensor of the policy, adapters left out."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dead(self) -> bool: ...


@dataclass(frozen=True)
class Resolution:
    """A strategy, its stages written out, with the rule of each tensor in each stage."""

    strategy: Strategy
    chosen: tuple[Mapping[str, int], ...]
    """For each stage: tensor name -> index of the rule that decides about it."""
    adapted: Mapping[str, Adapter]
    """Layer -> the adapter that any stage puts on it."""
    quantised: Mapping[str, Quantise]
    """Layer -> how its weight is rounded."""

    def rule(self, stage: int, tensor: str) -> Rule:
        """Return the rule that decides about `tensor` in a stage."""
        return self.strategy.stages[stage].rules[self.chosen[stage][tensor]]

    def where(self, stage: int, index: int) -> str:
        """Return the beginning of a message about rule `index` of a stage."""
        rule = self.strategy.stages[stage].rules[index]
        return f"strategy {self.strategy.title(stage)!r}: rule {index + 1} ({rule.select}; {rule.mode})"


def resolve_strategy(strategy: Strategy, tensors: Sequence[Weight], *, strict: bool) -> Resolution:
    """Resolve every stage of `strategy`, whose layer-by-layer stages are written out, against `tensors`.

    Raises StrategyError for a tensor without a rule; where two stages want different adapters or roundings
    for the same layer, or one trains what another quantises; and, if `strict`, for rules that take nothing.
    """
    decide_stage = resolve if strict else decide
    names = [tensor.name for tensor in tensors]
    chosen = tuple(
        dict(zip(names, decide_stage(tensors, stage.rules, strategy.title(number)), strict=True))
        for number, stage in enumerate(strategy.stages)
    )
    rules = Resolution(strategy, chosen, {}, {})
    adapted, quantised = _adapters(rules, tensors), _roundings(rules, tensors)
    _require_frozen(rules, tensors, quantised)
    return Resolution(strategy, chosen, adapted, quantised)


def _layers(rules: Resolution, tensors: Sequence[Weight]) -> Iterator[tuple[int, Weight, Rule]]:
    """Yield stage, weight and rule for everything that could be adapted or quantised."""
    for stage in range(len(rules.strategy.stages)):
        for tensor in tensors:
            if tensor.name.endswith(".weight") and not tensor.dead:
                yield stage, tensor, rules.rule(stage, tensor.name)


def _adapters(rules: Resolution, tensors: Sequence[Weight]) -> dict[str, Adapter]:
    adapted: dict[str, Adapter] = {}
    for stage, tensor, rule in _layers(rules, tensors):
        adapter = rule.adapter.fit_to(tensor.shape) if rule.adapter else None
        if adapter is not None and adapted.setdefault(_layer(tensor), adapter) != adapter:
            raise StrategyError(
                f"{rules.where(stage, rules.chosen[stage][tensor.name])} puts another adapter on "
                f"{tensor.name} than an earlier stage; adapters cannot change between stages: give both "
                "rules the same method and options"
            )
    return adapted


def _roundings(rules: Resolution, tensors: Sequence[Weight]) -> dict[str, Quantise]:
    quantised: dict[str, Quantise] = {}
    for stage, tensor, rule in _layers(rules, tensors):
        if rule.quantise and quantised.setdefault(_layer(tensor), rule.quantise) != rule.quantise:
            raise StrategyError(
                f"{rules.where(stage, rules.chosen[stage][tensor.name])} quantises {tensor.name} differently "
                "from an earlier stage; use the same `quantise` in both"
            )
    return quantised


def _require_frozen(rules: Resolution, tensors: Sequence[Weight], quantised: Mapping[str, Quantise]) -> None:
    for stage, tensor, rule in _layers(rules, tensors):
        if rule.mode == "full" and _layer(tensor) in quantised:
            raise StrategyError(
                f"strategy {rules.strategy.title(stage)!r}: a rule trains {tensor.name}, but another stage "
                "quantises it; a quantised weight cannot be trained: remove `quantise`, or put an adapter on "
                "it"
            )


def _layer(tensor: Weight) -> str:
    return tensor.name.removesuffix(".weight")
