"""A tuning plan: a strategy resolved against one policy, tensor by tensor, in one of its stages.

It gives the table that is printed before training, the optimiser's parameter groups, and the plan.json of a
checkpoint. `plan.at(stage)` is the plan of another stage. How a plan comes into force is said in `apply.py`.

Tensors have the names of the policy without adapters; an adapter's own tensors, those that peft gives them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from vlafit.errors import StrategyError
from vlafit.tuning import writing
from vlafit.tuning.adapters import Adapter, Quantise
from vlafit.tuning.rules import Rule, decide
from vlafit.tuning.strategy import Stage, Strategy, parse

if TYPE_CHECKING:
    from torch import nn

    from vlafit.recipe import OptimRecipe

FORMAT = 2
ADAM_BYTES = 8  # a parameter: two fp32 moments, whatever the precision of computation
UNDECAYED = ("norm", "embedding")
UNDECAYED_ADAPTERS = ("ia3_l", "lora_magnitude_vector", "lora_E")  # scales: to pull them to 0 is to prune


@dataclass(frozen=True)
class Entry:
    """What the plan says about one tensor."""

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
    """Learning rate, times the recipe's; 0 when it does not learn."""
    adapts: str = ""
    """Of an adapter's tensor: the name of the weight that it adapts."""

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
    """Of the policy; an adapter's own are not in it."""
    adapter: int
    """Parameters of its adapters."""
    trainable: int
    dead: int
    """Parameters that the loss never reaches; never trained, whatever the rule says."""
    lr: float
    """The highest learning rate of what learns, times the recipe's."""
    lr_lowest: float
    """The lowest: another one where layers decay, or LoRA+ gives B its own."""
    weight_decay: float | None
    """None: the recipe's."""
    optimiser_bytes: int


@dataclass(frozen=True)
class Plan:
    """A resolved strategy: one entry for each tensor of the policy, in its order, then those of adapters."""

    strategy: Strategy
    entries: tuple[Entry, ...] = field(repr=False)
    stage: int = 0

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the stage."""
        return self.strategy.stages[self.stage].rules

    @property
    def trainable(self) -> list[str]:
        """Names of the tensors that learn."""
        return [e.name for e in self.entries if e.trainable]

    @property
    def parameters(self) -> int:
        """All parameters of the policy; those of adapters are not in it."""
        return sum(e.parameters for e in self.entries if not e.adapts)

    @property
    def adapter_parameters(self) -> int:
        """All parameters of adapters."""
        return sum(e.parameters for e in self.entries if e.adapts)

    @property
    def trainable_parameters(self) -> int:
        """Parameters that learn."""
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
    def adapted(self) -> dict[str, Adapter]:
        """Layer -> the adapter on it, whether it learns in this stage or not."""
        return wanted(self.strategy, [e for e in self.entries if not e.adapts])[0]

    @property
    def quantised(self) -> dict[str, Quantise]:
        """Layer -> how its weight is rounded."""
        return wanted(self.strategy, [e for e in self.entries if not e.adapts])[1]

    def at(self, stage: int) -> "Plan":
        """Return the plan of another stage of the same strategy for the same policy."""
        rules = self.strategy.stages[stage].rules
        base = [e for e in self.entries if not e.adapts]
        chosen = dict(
            zip((e.name for e in base), decide(base, rules, told(self.strategy, stage)), strict=True)
        )
        entries = tuple(
            _entry(e, rules[i := chosen[e.adapts or e.name]], i, self.strategy.stages[stage])
            for e in self.entries
        )
        return Plan(self.strategy, entries, stage)

    def groups(self, policy: "nn.Module", optim: "OptimRecipe") -> list[dict[str, Any]]:
        """Return AdamW parameter groups: one for each learning rate and weight decay that occurs.

        A group holds `params`, their `names` in the same order, `lr` (the recipe's times the rule's) and
        `weight_decay` (0 for norms, biases and embeddings). Raises StrategyError when the policy does not
        have the plan's tensors.
        """
        from vlafit.tuning.inject import base_name

        tensors = {base_name(name): p for name, p in policy.named_parameters()}
        missing = [name for name in self.trainable if name not in tensors]
        if missing:
            raise StrategyError(
                f"the plan of strategy {self.strategy.name!r} is not of this policy, which lacks "
                f"{len(missing)} of its trainable tensors, such as {missing[0]}; apply the strategy to the "
                "policy that trains"
            )
        members: dict[tuple[float, float], list[str]] = {}
        for entry in self.entries:
            if not entry.trainable:
                continue
            decay = self.rules[entry.rule].weight_decay
            key = (
                optim.lr * entry.lr,
                (optim.weight_decay if decay is None else decay) if entry.decays else 0.0,
            )
            members.setdefault(key, []).append(entry.name)
        return [
            {"params": [tensors[n] for n in names], "names": names, "lr": lr, "weight_decay": decay}
            for (lr, decay), names in members.items()
        ]

    def to_json(self) -> str:
        """Return the text of plan.json: strategy, stage, table and every tensor."""
        return json.dumps(
            {
                "format": FORMAT,
                "strategy": writing.plain(self.strategy),
                "stage": self.stage,
                "table": self.rows(),
                "tensors": [asdict(e) for e in self.entries],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote. Raises StrategyError when the text is anything else."""
        try:
            values = json.loads(text)
            if values["format"] not in (1, FORMAT):
                raise StrategyError(
                    f"plan.json has format {values['format']!r}; this version reads format {FORMAT}"
                )
            if values["format"] == 1:  # one stage, no adapters
                return _from_format_1(values)
            told = dict(values["strategy"])
            strategy = parse(told, name=told.pop("name"), where="plan.json")
            entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in values["tensors"])
            plan = cls(strategy, entries, values["stage"])
            same = _told_alike(json.loads(plan.to_json()), values) and plan.at(plan.stage) == plan
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StrategyError(
                f"plan.json is damaged ({type(error).__name__}: {error}); take it from the run again"
            ) from error
        if not same:
            raise StrategyError(
                "plan.json contradicts itself: its table is not that of its tensors; "
                "take it from the run again"
            )
        return plan


def _told_alike(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Tell whether two plan.json say the same. An older one has no range of learning rates in its table."""
    tables = [[dict(row) for row in one["table"]] for one in (now, before)]
    if not any("lr_lowest" in row for row in tables[1]):
        for row in (row for table in tables for row in table):
            row.pop("lr", None)
            row.pop("lr_lowest", None)
    return {**now, "table": tables[0]} == {**before, "table": tables[1]}


def _from_format_1(values: dict[str, Any]) -> Plan:
    told = dict(values["strategy"])
    strategy = parse(told, name=told.pop("name"), where="plan.json")
    depths: dict[str, int] = {}
    for e in values["tensors"]:
        depths[e["part"]] = max(depths.get(e["part"], 0), (e["layer"] if e["layer"] is not None else -1) + 1)
    entries = tuple(
        Entry(**{**e, "shape": tuple(e["shape"]), "layers": depths[e["part"]]}) for e in values["tensors"]
    )
    plan = Plan(strategy, entries)
    said = {(row["rule"], row["tensors"], row["parameters"], row["trainable"]) for row in values["table"]}
    if said != {
        (row.rule, row.tensors, row.parameters, row.trainable)
        for row in (*plan.table, _row(0, "total", None, entries))
    }:
        raise StrategyError(
            "plan.json contradicts itself: its table is not that of its tensors; take it from the run again"
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
    """Return what `rule`, number `index` of `stage`, says about a tensor."""
    learns = not like.dead and (rule.adapter is not None if like.adapts else rule.mode == "full")
    learns = learns and ".ranknum." not in like.name  # a count that AdaLoRA keeps
    lr = rule.lr_at(like) * stage.lr if learns else 0.0
    if learns and rule.adapter and (".lora_B." in like.name or ".lora_embedding_B." in like.name):
        lr *= rule.adapter.lr_b
    return replace(like, rule=index, trainable=learns, lr=lr)


def told(strategy: Strategy, stage: int) -> str:
    """Return the strategy's name, with the stage where there are several."""
    if len(strategy.stages) == 1:
        return strategy.name
    return f"{strategy.name}, stage {stage + 1} ({strategy.stages[stage].name or 'no name'})"


def wanted(strategy: Strategy, base: Sequence[Entry]) -> tuple[dict[str, Adapter], dict[str, Quantise]]:
    """Return the adapters and the quantisation of all stages together, by layer.

    Raises StrategyError where two stages want different ones for the same layer.
    """
    adapted: dict[str, Adapter] = {}
    quantised: dict[str, Quantise] = {}
    trained: dict[str, int] = {}
    for number, stage in enumerate(strategy.stages):
        for entry, index in zip(base, decide(base, stage.rules, told(strategy, number)), strict=True):
            rule, layer = stage.rules[index], entry.name.removesuffix(".weight")
            if entry.dead or not entry.name.endswith(".weight"):
                continue
            where = f"strategy {told(strategy, number)!r}: rule {index + 1} ({rule.select}; {rule.mode})"
            fitting = rule.adapter.fit_to(entry.shape) if rule.adapter else None
            if fitting is not None and adapted.setdefault(layer, fitting) != fitting:
                raise StrategyError(
                    f"{where} adapts {entry.name} in another way than an earlier stage; an adapter that is "
                    "there stays as it is: give both rules the same method and options"
                )
            if rule.quantise and quantised.setdefault(layer, rule.quantise) != rule.quantise:
                raise StrategyError(f"{where} rounds {entry.name} in another way than an earlier stage")
            if rule.mode == "full":
                trained.setdefault(layer, number)
    for layer in sorted(trained.keys() & quantised.keys()):
        raise StrategyError(
            f"strategy {told(strategy, trained[layer])!r}: {layer}.weight is to learn, but another stage "
            "holds it quantised; a quantised weight cannot learn"
        )
    return adapted, quantised
