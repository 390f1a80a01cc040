"""A tuning plan: a strategy resolved against one policy, tensor by tensor.

`apply` sets `requires_grad` and returns the plan; the plan gives the table that is printed before training,
the optimiser's parameter groups, and the plan.json of a checkpoint. Applying another strategy to the same
policy replaces what an earlier one said, so a stage of training is one more call.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from vlafit.errors import StrategyError
from vlafit.tuning.rules import Mode, Rule, Strategy, load_strategy, parse, resolve

if TYPE_CHECKING:
    from torch import nn

    from vlafit.nn.policy import Policy
    from vlafit.recipe import OptimRecipe

FORMAT = 1
ADAM_BYTES = 8  # a parameter: two fp32 moments, whatever the precision of computation
UNDECAYED = ("norm", "embedding")


@dataclass(frozen=True)
class Entry:
    """What the plan says about one tensor."""

    name: str
    part: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    rule: int
    """Index of the strategy's rule that decided."""
    trainable: bool
    dead: bool
    """The loss never reaches it, so it is never trainable."""
    lr: float = 0.0
    """Learning rate, times the recipe's; 0 when it does not learn."""

    @property
    def parameters(self) -> int:
        """Number of values in the tensor."""
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices and kernels: no norm, bias or embedding."""
        return self.trainable and len(self.shape) >= 2 and self.kind not in UNDECAYED


@dataclass(frozen=True)
class Row:
    """One line of the tuning table: one rule, or (`rule` 0) the sum of all."""

    rule: int
    select: str
    mode: str
    tensors: int
    parameters: int
    trainable: int
    dead: int
    """Parameters that the loss never reaches; never trained, whatever the rule says."""
    lr: float
    weight_decay: float | None
    """None: the recipe's."""
    optimiser_bytes: int


@dataclass(frozen=True)
class Plan:
    """A resolved strategy: one entry for each tensor of the policy, in the policy's order."""

    strategy: Strategy
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def trainable(self) -> list[str]:
        """Names of the tensors that learn."""
        return [e.name for e in self.entries if e.trainable]

    @property
    def parameters(self) -> int:
        """All parameters of the policy."""
        return sum(e.parameters for e in self.entries)

    @property
    def trainable_parameters(self) -> int:
        """Parameters that learn."""
        return sum(e.parameters for e in self.entries if e.trainable)

    @property
    def table(self) -> list[Row]:
        """One row for each rule, in order."""
        return [
            _row(i + 1, str(rule.select), rule, [e for e in self.entries if e.rule == i])
            for i, rule in enumerate(self.strategy.rules)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as plain values for JSON and printing, the total last (rule 0)."""
        return [asdict(row) for row in (*self.table, _row(0, "total", None, self.entries))]

    def groups(self, policy: "nn.Module", optim: "OptimRecipe") -> list[dict[str, Any]]:
        """Return AdamW parameter groups: one for each learning rate and weight decay that occurs.

        A group holds `params`, their `names` in the same order, `lr` (the recipe's times the rule's) and
        `weight_decay` (0 for norms, biases and embeddings). Raises StrategyError when the policy does not
        have the plan's tensors.
        """
        tensors = dict(policy.named_parameters())
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
            decay = self.strategy.rules[entry.rule].weight_decay
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
        """Return the text of plan.json: strategy, table and every tensor."""
        return json.dumps(
            {
                "format": FORMAT,
                "strategy": _plain(self.strategy),
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
            if values["format"] != FORMAT:
                raise StrategyError(
                    f"plan.json has format {values['format']!r}; this version reads format {FORMAT}"
                )
            strategy = values["strategy"]
            rules = parse(
                strategy["rule"], name=strategy["name"], where="plan.json", purpose=strategy["purpose"]
            )
            entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in values["tensors"])
        except (ValueError, KeyError, TypeError) as error:
            raise StrategyError(
                f"plan.json is damaged ({type(error).__name__}: {error}); take it from the run again"
            ) from error
        plan = cls(rules, entries)
        if json.loads(plan.to_json()) != values:
            raise StrategyError(
                "plan.json contradicts itself: its table is not that of its tensors; "
                "take it from the run again"
            )
        return plan


def _plain(strategy: Strategy) -> dict[str, object]:
    """Return the strategy as the tables that `parse` reads."""

    def rule(r: Rule) -> Iterator[tuple[str, object]]:
        select = {key: value for key, value in asdict(r.select).items() if value}
        if select:
            yield "select", {k: v if isinstance(v, str) else list(v) for k, v in select.items()}
        yield "mode", r.mode
        if r.lr != 1.0:
            yield "lr", r.lr
        if r.weight_decay is not None:
            yield "weight_decay", r.weight_decay
        if r.optional:
            yield "optional", True

    return {
        "name": strategy.name,
        "purpose": strategy.purpose,
        "rule": [dict(rule(r)) for r in strategy.rules],
    }


def _row(number: int, select: str, rule: Rule | None, entries: Sequence[Entry]) -> Row:
    trainable = sum(e.parameters for e in entries if e.trainable)
    mode: Mode | str = rule.mode if rule else ""
    return Row(
        rule=number,
        select=select,
        mode=mode,
        tensors=len(entries),
        parameters=sum(e.parameters for e in entries),
        trainable=trainable,
        dead=sum(e.parameters for e in entries if e.dead),
        lr=rule.lr if rule and rule.mode != "frozen" else 0.0,
        weight_decay=rule.weight_decay if rule else None,
        optimiser_bytes=trainable * ADAM_BYTES,
    )


def preview(policy: "Policy", strategy: Strategy) -> Plan:
    """Resolve `strategy` against `policy` without touching it; a policy on the meta device will do.

    Raises StrategyError when the rules do not fit the policy, or when nothing would be trained.
    """
    infos = policy.parts()
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.named_parameters()}
    if {i.name for i in infos} != set(shapes) or len(infos) != len(shapes):
        odd = sorted({i.name for i in infos} ^ set(shapes)) or [i.name for i in infos]
        raise StrategyError(
            f"{type(policy).__name__}.parts() does not name every parameter exactly once, for example "
            f"{odd[0]}; mend parts() in the policy's file"
        )
    entries = []
    for info, index in zip(infos, resolve(infos, strategy), strict=True):
        rule = strategy.rules[index]
        learns = rule.mode != "frozen" and not info.dead
        entries.append(
            Entry(
                info.name,
                info.part,
                info.kind,
                info.layer,
                shapes[info.name],
                index,
                learns,
                info.dead,
                rule.lr * learns,
            )
        )
    resolved = Plan(strategy, tuple(entries))
    if not resolved.trainable:
        raise StrategyError(
            f"strategy {strategy.name!r} trains nothing in this {type(policy).__name__}: every tensor is "
            f"frozen{' or out of reach of the loss' if any(e.dead for e in entries) else ''}; "
            'give at least one rule that matches something mode = "full"'
        )
    for index, rule in enumerate(strategy.rules):
        if rule.weight_decay and not any(e.decays for e in entries if e.rule == index) and not rule.optional:
            raise StrategyError(
                f"strategy {strategy.name!r}: rule {index + 1} ({rule.select}) sets weight_decay, but takes "
                "nothing that decays: norms, biases and embeddings never do; remove weight_decay"
            )
    return resolved


def apply(policy: "Policy", strategy: Strategy) -> Plan:
    """Resolve `strategy` against `policy`, set `requires_grad` of every parameter, and return the plan.

    What does not learn loses any gradient that it still holds. Raises StrategyError as `preview` does, and
    then leaves the policy as it was.
    """
    resolved = preview(policy, strategy)
    learns = {e.name: e.trainable for e in resolved.entries}
    for name, tensor in policy.named_parameters():
        tensor.requires_grad_(learns[name])
        if not learns[name]:
            tensor.grad = None
    return resolved


def apply_strategy(policy: "Policy", strategy: str | Sequence[Mapping[str, object]]) -> Plan:
    """Apply a strategy given as the name of a shipped one, the path of a TOML file, or a list of rule tables.

        plan = vlafit.apply_strategy(policy, "expert")
        rules = [{"select": {"part": "expert"}, "mode": "full"}, {"mode": "frozen"}]
        plan = vlafit.apply_strategy(policy, rules)

    Raises ConfigError when the file cannot be found or read, StrategyError when it does not fit the policy.
    """
    if isinstance(strategy, str):
        return apply(policy, load_strategy(strategy))
    return apply(policy, parse(strategy, name="rules", where="the list of rules"))
