"""A tuning plan: a strategy resolved against one policy, tensor by tensor, in one of its stages.

It holds the table that is printed before training, the optimiser's parameter groups, and the plan.json of a
checkpoint. `plan.at(stage)` is the plan of another stage. `apply.py` puts a plan into force.

Base tensors have the names they have without adapters; adapter tensors have the names that peft gives them.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from vlafit.errors import StrategyError
from vlafit.files import parse_object
from vlafit.tuning.adapters import Adapter, Quantise
from vlafit.tuning.resolution import Resolution, resolve_strategy
from vlafit.tuning.rules import Rule
from vlafit.tuning.strategy import Stage, Strategy
from vlafit.tuning.strategy_toml import parse, to_tables

if TYPE_CHECKING:
    from torch import nn

    from vlafit.recipe import OptimRecipe

FORMAT = 2
ADAM_BYTES = 8  # a parameter: two fp32 moments, whatever the precision of computation
UNDECAYED = ("norm", "embedding")
UNDECAYED_ADAPTERS = ("ia3_l", "lora_magnitude_vector", "lora_E")  # scales: to pull them to 0 is to prune


@dataclass(frozen=True)
class Entry:
    """The plan for one tensor."""

    name: str
    part: str
    kind: str
    layer: int | None
    layers: int
    shape: tuple[int, ...]
    rule: int
    """Index, in the stage, of the rule that decided."""
    trainable: bool
    dead: bool
    """The loss never reaches it, so it is never trainable."""
    lr: float = 0.0
    """Learning rate, times the recipe's; 0 when the tensor is not trained."""
    adapts: str = ""
    """For an adapter's tensor: the name of the weight that it adapts."""

    @property
    def parameters(self) -> int:
        """Number of values in the tensor."""
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices and kernels: no norm, bias, embedding or scale."""
        return (
            self.trainable
            and len(self.shape) >= 2
            and self.kind not in UNDECAYED
            and not (self.adapts and any(f".{word}." in self.name for word in UNDECAYED_ADAPTERS))
        )


@dataclass(frozen=True)
class Row:
    """One line of the tuning table: one rule, or (`rule` 0) the sum of all."""

    rule: int
    select: str
    mode: str
    tensors: int
    parameters: int
    """Parameters of the policy, without those of adapters."""
    adapter: int
    """Parameters of its adapters."""
    trainable: int
    dead: int
    """Parameters that the loss never reaches; they are never trained, whatever the rule's mode."""
    lr: float
    """Highest learning rate of the trainable tensors, times the recipe's."""
    lr_lowest: float
    """Lowest learning rate; it differs with `layer_decay` and with LoRA+ (`lr_b`)."""
    weight_decay: float | None
    """None: the recipe's weight decay."""
    optimiser_bytes: int


@dataclass(frozen=True)
class Plan:
    """A resolved strategy: one entry for each tensor of the policy, in its order, then those of adapters."""

    resolution: Resolution = field(repr=False)
    entries: tuple[Entry, ...] = field(repr=False)
    stage: int = 0

    @property
    def strategy(self) -> Strategy:
        """The strategy that was resolved, its layer-by-layer stages written out."""
        return self.resolution.strategy

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the stage."""
        return self.strategy.stages[self.stage].rules

    @property
    def trainable(self) -> list[str]:
        """Names of the trainable tensors."""
        return [e.name for e in self.entries if e.trainable]

    def never_trained(self, names: Collection[str]) -> list[Entry]:
        """Return the tensors among `names` that every stage freezes, and no adapter changes."""
        stages = range(len(self.strategy.stages))
        return [
            one
            for one in self.entries
            if one.name in names
            and not (one.dead or one.adapts)
            and all(self.resolution.rule(stage, one.name).mode == "frozen" for stage in stages)
        ]

    @property
    def parameters(self) -> int:
        """Number of parameters of the policy, without those of adapters."""
        return sum(e.parameters for e in self.entries if not e.adapts)

    @property
    def adapter_parameters(self) -> int:
        """Number of parameters of all adapters."""
        return sum(e.parameters for e in self.entries if e.adapts)

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(e.parameters for e in self.entries if e.trainable)

    @property
    def table(self) -> list[Row]:
        """One row for each rule, in order."""
        return [
            _row(i + 1, str(rule.select), rule, [e for e in self.entries if e.rule == i])
            for i, rule in enumerate(self.rules)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as plain values for JSON and printing, the total last (rule 0)."""
        return [asdict(row) for row in (*self.table, _row(0, "total", None, self.entries))]

    @property
    def adapted(self) -> Mapping[str, Adapter]:
        """Layer -> the adapter on it, whether this stage trains it or not."""
        return self.resolution.adapted

    @property
    def quantised(self) -> Mapping[str, Quantise]:
        """Layer -> how its weight is rounded."""
        return self.resolution.quantised

    def at(self, stage: int) -> "Plan":
        """Return the plan of another stage of the same strategy for the same policy."""
        rules, chosen = self.strategy.stages[stage].rules, self.resolution.chosen[stage]
        entries = tuple(
            _entry(
                entry, rules[index := chosen[entry.adapts or entry.name]], index, self.strategy.stages[stage]
            )
            for entry in self.entries
        )
        return Plan(self.resolution, entries, stage)

    def groups(self, policy: "nn.Module", optim: "OptimRecipe") -> list[dict[str, Any]]:
        """Return AdamW parameter groups: one for each pair of learning rate and weight decay.

        A group holds `params`, their `names` in the same order, the numbers of their `rules`, `lr` (the
        recipe's times the rule's) and `weight_decay` (0 for norms, biases and embeddings). Raises
        StrategyError when the policy does not have the plan's tensors.
        """
        from vlafit.tuning.inject import base_name

        tensors = {base_name(name): p for name, p in policy.named_parameters()}
        missing = [name for name in self.trainable if name not in tensors]
        if missing:
            raise StrategyError(
                f"the plan of strategy {self.strategy.name!r} was made for another policy: this one lacks "
                f"{len(missing)} of its trainable tensors, such as {missing[0]}; apply the strategy to the "
                "policy that is trained"
            )
        members: dict[tuple[float, float], list[str]] = {}
        rules: dict[tuple[float, float], list[int]] = {}
        for entry in self.entries:
            if not entry.trainable:
                continue
            decay = self.rules[entry.rule].weight_decay
            key = (
                optim.lr * entry.lr,
                (optim.weight_decay if decay is None else decay) if entry.decays else 0.0,
            )
            members.setdefault(key, []).append(entry.name)
            rules.setdefault(key, []).append(entry.rule)
        return [
            {
                "params": [tensors[n] for n in names],
                "names": names,
                "rules": sorted(set(rules[lr, decay])),
                "lr": lr,
                "weight_decay": decay,
            }
            for (lr, decay), names in members.items()
        ]

    def to_json(self) -> str:
        """Return the text of plan.json: strategy, stage, table and every tensor."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "strategy": to_tables(self.strategy),
                "stage": self.stage,
                "table": self.rows(),
                "tensors": [vars(e) for e in self.entries],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, where: str = "plan.json") -> "Plan":
        """Read what `to_json` wrote. Raises StrategyError, naming `where`, for any other text."""
        try:
            values = parse_object(text)
            if values["format"] not in (1, FORMAT):
                raise StrategyError(
                    f"{where} has format {values['format']!r}; this version reads format {FORMAT}"
                )
            if values["format"] == 1:  # one stage, no adapters
                return _from_format_1(values)
            strategy = _read_strategy(values)
            entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in values["tensors"])
            base = [entry for entry in entries if not entry.adapts]
            plan = cls(resolve_strategy(strategy, base, strict=False), entries, values["stage"])
            same = _equal_json(json.loads(plan.to_json()), values) and plan.at(plan.stage) == plan
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StrategyError(
                f"{where} is damaged ({type(error).__name__}: {error}); copy it from the run again"
            ) from error
        if not same:
            raise StrategyError(
                f"{where} is inconsistent: its table does not match its tensors; copy it from the run again"
            )
        return plan


def _read_strategy(values: dict[str, Any]) -> Strategy:
    table = dict(values["strategy"])
    return parse(table, name=table.pop("name"), where="plan.json")


def _equal_json(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Tell whether two plan.json are equal. An older one has no range of learning rates in its table."""
    tables = [[dict(row) for row in plan["table"]] for plan in (now, before)]
    if not any("lr_lowest" in row for row in tables[1]):
        for row in (row for table in tables for row in table):
            row.pop("lr", None)
            row.pop("lr_lowest", None)
    return {**now, "table": tables[0]} == {**before, "table": tables[1]}


def _from_format_1(values: dict[str, Any]) -> Plan:
    strategy = _read_strategy(values)
    depths: dict[str, int] = {}
    for e in values["tensors"]:
        depths[e["part"]] = max(depths.get(e["part"], 0), (e["layer"] if e["layer"] is not None else -1) + 1)
    entries = tuple(
        Entry(**{**e, "shape": tuple(e["shape"]), "layers": depths[e["part"]]}) for e in values["tensors"]
    )
    plan = Plan(resolve_strategy(strategy, entries, strict=False), entries)
    stored = {(row["rule"], row["tensors"], row["parameters"], row["trainable"]) for row in values["table"]}
    if stored != {
        (row.rule, row.tensors, row.parameters, row.trainable)
        for row in (*plan.table, _row(0, "total", None, entries))
    }:
        raise StrategyError(
            "plan.json is inconsistent: its table does not match its tensors; copy it from the run again"
        )
    return plan


def _row(number: int, select: str, rule: Rule | None, entries: Sequence[Entry]) -> Row:
    trainable = sum(e.parameters for e in entries if e.trainable)
    rates = [e.lr for e in entries if e.trainable and rule] or [0.0]
    base = [e for e in entries if not e.adapts]
    mode = rule.mode if rule else ""
    return Row(
        rule=number,
        select=select,
        mode=f"{mode} on {rule.quantise}" if rule and rule.quantise else mode,
        tensors=len(base),
        parameters=sum(e.parameters for e in base),
        adapter=sum(e.parameters for e in entries if e.adapts),
        trainable=trainable,
        dead=sum(e.parameters for e in base if e.dead),
        lr=max(rates),
        lr_lowest=min(rates),
        weight_decay=rule.weight_decay if rule else None,
        optimiser_bytes=trainable * ADAM_BYTES,
    )


def _entry(like: Entry, rule: Rule, index: int, stage: Stage) -> Entry:
    """Return the entry of a tensor under `rule`, number `index` of `stage`."""
    trainable = not like.dead and (rule.adapter is not None if like.adapts else rule.mode == "full")
    trainable = trainable and ".ranknum." not in like.name  # a count that AdaLoRA keeps
    lr = rule.lr_at(like) * stage.lr if trainable else 0.0
    if trainable and rule.adapter and (".lora_B." in like.name or ".lora_embedding_B." in like.name):
        lr *= rule.adapter.lr_b
    return replace(like, rule=index, trainable=trainable, lr=lr)
