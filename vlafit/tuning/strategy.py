"""A tuning strategy: rules in order, for the whole run or stage by stage.

`strategy_toml.py` reads and writes its TOML; `resolution.py` resolves it against a policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlafit.errors import StrategyError, did_you_mean
from vlafit.tuning.rules import TOP, Described, Rule

StopGradient = Literal["", "prefix"]


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
    """The rules of one period of a run."""

    rules: tuple[Rule, ...]
    name: str = ""
    begin: Moment | None = None
    """None: with the run's first step."""
    lr: float = 1.0
    """Learning rate of all its rules, times the recipe's."""
    warmup_steps: int = 0
    """Steps of linear warm-up when it begins. The first stage uses the recipe's."""
    layer_by_layer: int = 0
    """Layers that each repetition of the stage adds, from the top. 0: the stage is not repeated."""
    stop_gradient: StopGradient = ""
    """"prefix": the loss of the actions leaves no gradient in the pass over images and prompt."""
    every: Moment | None = None
    """When the next repetition begins, counted from the previous one."""


@dataclass(frozen=True)
class Strategy:
    """A named list of stages; usually one stage, from the first step on."""

    name: str
    stages: tuple[Stage, ...]
    purpose: str = ""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the first stage."""
        return self.stages[0].rules

    @property
    def lowers_ranks(self) -> bool:
        """Whether AdaLoRA lowers the ranks of layers during training."""
        rules = (rule for stage in self.stages for rule in stage.rules)
        return any(rule.adapter is not None and rule.adapter.method == "adalora" for rule in rules)

    def title(self, stage: int) -> str:
        """Return the strategy's name, with the stage where there are several."""
        if len(self.stages) == 1:
            return self.name
        return f"{self.name}, stage {stage + 1} ({self.stages[stage].name or 'no name'})"

    def expand(self, infos: Sequence[Described]) -> "Strategy":
        """Return the strategy with each layer-by-layer stage expanded for a policy with these parameters.

        Raises StrategyError when such a stage's rules name no part, or one that has no layers.
        """
        if not any(stage.layer_by_layer for stage in self.stages):
            return self
        written: list[Stage] = []
        for number, stage in enumerate(self.stages, 1):
            written += _repeated(stage, infos, f"strategy {self.name!r}: stage {number}")
        require_order(written, f"strategy {self.name!r}")
        return replace(self, stages=tuple(written))


def _repeated(stage: Stage, infos: Sequence[Described], where: str) -> list[Stage]:
    if not stage.layer_by_layer:
        return [stage]
    parts = {p for rule in stage.rules if rule.select.layers == TOP for p in rule.select.part}
    depths = {part: max((i.layers for i in infos if i.part == part), default=0) for part in sorted(parts)}
    flat = [part for part, depth in depths.items() if not depth]
    if flat or not depths:
        layered = sorted({i.part for i in infos if i.layers})
        raise StrategyError(
            f"{where}: `layer_by_layer` finds no layers in {', '.join(flat) or 'no part'}; give "
            'the rules with `layers = "top"` a `part` that has layers'
            f"{did_you_mean(flat[0] if flat else '', layered)}"
        )
    depth = max(depths.values())
    repetitions: list[Stage] = []
    for reached in range(stage.layer_by_layer, depth + stage.layer_by_layer, stage.layer_by_layer):
        reached = min(reached, depth)
        rules = tuple(narrowed for rule in stage.rules for narrowed in _expand_top(rule, reached, depths))
        name = f"{stage.name or 'layers'}, top {reached}"
        begin = stage.begin if not repetitions else _after(repetitions[-1].begin, stage.every, where)
        repetitions.append(replace(stage, rules=rules, name=name, begin=begin, layer_by_layer=0, every=None))
    return repetitions


def _expand_top(rule: Rule, reached: int, depths: Mapping[str, int]) -> Iterator[Rule]:
    """Yield the rule with "top" replaced by a range: once for all parts, or once for each of their depths."""
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
    raise StrategyError(f"{where}: `begin` and `every` must both be steps, or both fractions")


def require_order(stages: Sequence[Stage], where: str) -> None:
    """Raise StrategyError where a stage begins before the previous one, or after the run's end."""
    last: Moment | None = None
    for i, stage in enumerate(stages[1:], 2):
        begin = stage.begin
        assert begin is not None
        for kind in ("step", "fraction"):
            now, before = getattr(begin, kind), getattr(last, kind) if last else 0
            if now is not None and before is not None and now <= before:
                raise StrategyError(f"{where}: stage {i} begins at {begin}, not after the previous stage")
        if begin.fraction is not None and begin.fraction >= 1:
            raise StrategyError(
                f"{where}: stage {i} ({stage.name or 'without a name'}) would begin at {begin}, after the "
                "end of the run; add more layers at a time, or add them sooner (`layer_by_layer`, `every`)"
            )
        last = begin
