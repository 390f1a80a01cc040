"""From a strategy to a policy that is ready to learn: resolve, check, put adapters in, set `requires_grad`.

The adapters of all stages are put in at the beginning: they change nothing until they learn, and what wraps
the policy for several processes sees one structure throughout. A later stage is `enter(policy, plan.at(1))`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlafit import shipped
from vlafit.errors import StrategyError
from vlafit.tuning.adapters import largest_rank, require_works
from vlafit.tuning.plan import Entry, Plan, told, wanted
from vlafit.tuning.rules import resolve
from vlafit.tuning.strategy import Strategy, load_strategy, parse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlafit.nn.policy import Policy

log = logging.getLogger(__name__)

UNCHANGED = 1e-5  # of the output's largest value: float32 rounding of an adapter that adds nothing


def preview(policy: "Policy", strategy: Strategy) -> Plan:
    """Resolve `strategy` against `policy` without touching it; a policy on the meta device will do.

    Raises StrategyError when the rules do not fit the policy, when a stage would train nothing, or when an
    adapter does not work on a layer.
    """
    from vlafit.tuning.inject import adapter_shapes, make_groups, require_bare

    require_bare(policy)
    infos = policy.parts()
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.named_parameters()}
    if {i.name for i in infos} != set(shapes) or len(infos) != len(shapes):
        odd = sorted({i.name for i in infos} ^ set(shapes)) or [i.name for i in infos]
        raise StrategyError(
            f"{type(policy).__name__}.parts() does not name every parameter exactly once, for example "
            f"{odd[0]}; mend parts() in the policy's file"
        )
    strategy = strategy.expand(infos)
    base = [Entry(i.name, i.part, i.kind, i.layer, i.layers, shapes[i.name], 0, False, i.dead) for i in infos]
    adapted, _ = wanted(strategy, base)
    groups = make_groups(adapted)
    if sum(group.adapter.method == "adalora" for group in groups) > 1:
        raise StrategyError(
            f"strategy {strategy.name!r}: AdaLoRA shares one budget of ranks, so all its rules need the same "
            "options"
        )
    _require_fitting(policy, strategy, base)
    _require_ranks(policy, strategy, base)
    described = {e.name: e for e in base}
    added = [
        replace(described[weight], name=name, shape=shape, adapts=weight)
        for name, (weight, shape) in adapter_shapes(policy, groups).items()
    ]
    bare = Plan(strategy, (*base, *added))
    plans = [bare.at(stage) for stage in range(len(strategy.stages))]
    for plan in plans:
        _require_use(plan, type(policy).__name__)
    return plans[0]


def _require_fitting(policy: "Policy", strategy: Strategy, base: Sequence[Entry]) -> None:
    """Raise StrategyError where a rule's adapter, or its quantisation, does not fit a tensor it takes."""
    from vlafit.tuning.inject import layer_kind

    for number, stage in enumerate(strategy.stages):
        for entry, index in zip(base, resolve(base, stage.rules, told(strategy, number)), strict=True):
            rule = stage.rules[index]
            where = f"strategy {told(strategy, number)!r}: rule {index + 1} ({rule.select}; {rule.mode})"
            kind = layer_kind(policy, entry.name)
            if rule.adapter is not None and not entry.dead and not _is_bias(policy, entry.name):
                require_works(rule.adapter, kind, entry.name, where)
                if rule.adapter.method == "oft" and rule.adapter.fit_to(entry.shape).block < 2:
                    raise StrategyError(
                        f"{where} takes {entry.name} {list(entry.shape)}, whose {entry.shape[1]} inputs no "
                        f"`block` from 2 to {rule.adapter.block} divides, so that nothing would turn; give "
                        "another `block`, or leave that layer to another rule"
                    )
                if rule.adapter.init == "pissa" and rule.adapter.rank > min(entry.shape):
                    raise StrategyError(
                        f"{where} takes {entry.name} {list(entry.shape)}, which has only {min(entry.shape)} "
                        f"singular vectors, not `rank` {rule.adapter.rank}"
                    )
            if (
                rule.quantise
                and not entry.dead
                and not _is_bias(policy, entry.name)
                and (kind != "linear" or entry.kind not in ("attention", "mlp"))
            ):
                raise StrategyError(
                    f"{where} takes {entry.name} ({entry.kind}); only the linear layers of attention and mlp "
                    'can be quantised: narrow the rule by kind = ["attention", "mlp"]'
                )


ABSURD = 8  # times what the roomiest layer of a rule has room for: a slip, not a choice


def _require_ranks(policy: "Policy", strategy: Strategy, base: Sequence[Entry]) -> None:
    """Raise StrategyError where a rule's rank cannot be meant or made; log where layers have no room for it.

    A rank beyond a layer's smaller side works and gains nothing: a preset for real sizes still runs on a tiny
    policy. MiSS cannot be put in at all then.
    """
    from vlafit.tuning.inject import layer_kind

    for number, stage in enumerate(strategy.stages):
        taken: dict[int, list[tuple[str, int]]] = {}
        for entry, index in zip(base, resolve(base, stage.rules, told(strategy, number)), strict=True):
            adapter = stage.rules[index].adapter
            if adapter and not entry.dead and layer_kind(policy, entry.name) is not None:
                most = largest_rank(adapter.method, entry.shape)
                if most is not None:
                    taken.setdefault(index, []).append((entry.name, most))
        for index, layers in taken.items():
            rule = stage.rules[index]
            assert rule.adapter is not None
            rank, (roomy, most) = rule.adapter.rank, max(layers, key=lambda one: one[1])
            beyond = [name for name, its in layers if its < rank]
            where = f"strategy {told(strategy, number)!r}: rule {index + 1} ({rule.select}; {rule.mode})"
            cut = rule.adapter.method == "miss"  # its shards are cut from the layer's own sides
            if rank > ABSURD * most or (beyond and cut):
                name, its = min(layers, key=lambda one: one[1]) if cut else (roomy, most)
                raise StrategyError(
                    f"{where}: `rank` {rank} is more than the {its} that {name} has room for; make it "
                    f'smaller, or train those layers in full: mode = "full"'
                )
            if beyond:
                log.warning(
                    "%s: `rank` %d is more than %d of the %d layers have room for, such as %s; what is "
                    "beyond costs memory and learns nothing",
                    where, rank, len(beyond), len(layers), beyond[0],
                )  # fmt: skip


def _is_bias(policy: "Policy", name: str) -> bool:
    """Tell whether it is the bias of a layer whose weight could be adapted; such a bias stays frozen."""
    from vlafit.tuning.inject import layer_kind

    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and layer_kind(policy, f"{owner}.weight") is not None


def _require_use(plan: Plan, policy: str) -> None:
    """Raise StrategyError when a stage trains nothing, or a rule's weight decay decays nothing."""
    name = told(plan.strategy, plan.stage)
    if not plan.trainable:
        raise StrategyError(
            f"strategy {name!r} trains nothing in this {policy}: every tensor is "
            f"frozen{' or out of reach of the loss' if any(e.dead for e in plan.entries) else ''}; "
            'give at least one rule that matches something mode = "full"'
        )
    for index, rule in enumerate(plan.rules):
        mine = [e for e in plan.entries if e.rule == index]
        if rule.adapter and mine and not any(e.trainable for e in mine) and not rule.optional:
            raise StrategyError(
                f"strategy {name!r}: rule {index + 1} ({rule.select}; {rule.mode}) takes nothing that an "
                "adapter could sit on; remove it, or widen its `select`"
            )
        if rule.weight_decay and not any(e.decays for e in mine) and not rule.optional:
            raise StrategyError(
                f"strategy {name!r}: rule {index + 1} ({rule.select}) sets weight_decay, but takes "
                "nothing that decays: norms, biases and embeddings never do; remove weight_decay"
            )


def apply(
    policy: "Policy", strategy: Strategy, *, seed: int = 0, probe: "Callable[[], Tensor] | None" = None
) -> Plan:
    """Resolve `strategy` against `policy`, put its adapters in, and enter its first stage.

    Adapters begin from `seed`. `probe` computes an output of the policy; it must be the same before and after
    the adapters are put in. Raises StrategyError as `preview` does, and then leaves the policy as it was; or
    when the probe's output changes, and then the policy is not to be used.
    """
    from vlafit.tuning.inject import inject, make_groups, quantise

    plan = preview(policy, strategy)
    quantise(policy, plan.quantised)
    before = probe() if probe and plan.adapted else None
    inject(policy, make_groups(plan.adapted), seed)
    if probe is not None and before is not None:
        _require_unchanged(before, probe(), strategy.name)
    enter(policy, plan)
    return plan


def _require_unchanged(before: "Tensor", after: "Tensor", name: str) -> None:
    scale = max(1.0, float(before.abs().max()))
    change = float((after - before).abs().max()) / scale
    if not change <= UNCHANGED:
        raise StrategyError(
            f"strategy {name!r}: putting the adapters in changed the policy's output by {change:.1e} "
            f"(relative; at most {UNCHANGED:.0e} is rounding), though they have learned nothing yet; use "
            "another method or `init`, and report this"
        )


def restore(policy: "Policy", plan: Plan) -> None:
    """Put adapters into the bare policy as new ones, to be filled from a checkpoint, and enter the stage."""
    from vlafit.tuning.inject import as_new, inject, make_groups, quantise

    quantise(policy, plan.quantised)
    inject(policy, [as_new(group) for group in make_groups(plan.adapted)])
    enter(policy, plan)


def enter(policy: "nn.Module", plan: Plan) -> None:
    """Set `requires_grad` of every parameter as the plan's stage says.

    What does not learn loses any gradient that it still holds. Raises StrategyError, and leaves the policy as
    it was, when the plan is of another policy.
    """
    from vlafit.tuning.inject import base_name

    learns = {e.name: e.trainable for e in plan.entries}
    tensors = {base_name(name): p for name, p in policy.named_parameters()}
    if tensors.keys() != learns.keys():
        odd = sorted(tensors.keys() ^ learns.keys())
        raise StrategyError(
            f"the plan of strategy {plan.strategy.name!r} is not of this policy: they differ in {odd[:3]}"
        )
    for name, tensor in tensors.items():
        if tensor.requires_grad != learns[name]:
            tensor.requires_grad_(learns[name])
        if not learns[name]:
            tensor.grad = None


def apply_strategy(
    policy: "Policy",
    strategy: str | Path | Sequence[Mapping[str, object]] | Mapping[str, object],
    *,
    seed: int = 0,
) -> Plan:
    """Apply a strategy: a shipped one by name, a TOML file by path, or a list of rule tables.

        plan = vlafit.apply_strategy(policy, "expert")
        rules = [{"select": {"part": "expert"}, "mode": "full"}, {"mode": "frozen"}]
        plan = vlafit.apply_strategy(policy, rules)

    A strategy of full and frozen rules replaces an earlier one; adapters are put in once, and weights are
    quantised once: merge, or load the policy again, before the next such strategy. Raises ConfigError when
    the file cannot be found or read, StrategyError when it does not fit the policy.
    """
    match strategy:
        case str() | Path():
            return apply(policy, load_strategy(str(strategy)), seed=seed)
        case bytes() | bytearray():
            pass
        case Mapping() | Sequence():
            return apply(policy, parse(strategy, name="rules", where="the list of rules"), seed=seed)
    raise StrategyError(
        f"a strategy is a shipped one's name ({', '.join(shipped.names('strategy'))}), the path of a TOML "
        'file, a list of rule tables such as [{"mode": "full"}], or what such a file says as a table; not '
        f"{type(strategy).__name__}: {strategy!r}"
    )
