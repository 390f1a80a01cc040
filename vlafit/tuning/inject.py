"""Adapters put into a policy by peft, in place, and named: one adapter name for each group of equal settings.

peft gives the layers and their mathematics; which layers, in which order and what learns is ours (`plan.py`).
An adapted layer becomes a peft layer around it: its own tensors then lie below `base_layer`. `base_name`
undoes that, so that a tensor has one name in plans and checkpoints, adapted or not.
"""

import copy
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlafit.errors import StrategyError
from vlafit.nn.attached import Attached, attach, attached
from vlafit.tuning.adapters import Adapter, Layer, Quantise
from vlafit.tuning.quantise import quantise_layer, quantised_names

log = logging.getLogger(__name__)

PER_MODULE = ("lora", "dora")  # peft takes rank and alpha of these by module


@dataclass(frozen=True)
class Group:
    """Layers that share one adapter name and one PEFT folder."""

    name: str
    adapter: Adapter
    """Settings of all; rank and alpha of LoRA and DoRA may differ by layer."""
    layers: Mapping[str, Adapter]
    """Name of the layer -> its own settings."""


def make_groups(adapted: Mapping[str, Adapter]) -> list[Group]:
    """Return the groups for `adapted`: layer name -> settings."""
    members: dict[Adapter, dict[str, Adapter]] = {}
    for layer, adapter in adapted.items():
        shared = replace(adapter, rank=1, alpha=1.0) if adapter.method in PER_MODULE else adapter
        members.setdefault(shared, {})[layer] = adapter
    groups, counts = [], dict.fromkeys((a.method for a in members), 0)
    for shared, layers in members.items():
        counts[shared.method] += 1
        number = counts[shared.method]
        name = shared.method if number == 1 else f"{shared.method}_{number}"
        groups.append(Group(name, next(iter(layers.values())), layers))
    return groups


def layer_kind(policy: nn.Module, name: str) -> Layer | None:
    """Return which kind of layer the tensor `name` is the weight of, or None when it is no such weight."""
    owner, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    module = policy.get_submodule(owner)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def base_name(name: str) -> str:
    """Return the name that a tensor of the policy has when nothing is adapted."""
    return name.replace(".base_layer.", ".")


def adapted_layers(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every layer that carries an adapter."""
    if "peft" not in sys.modules:  # nobody made such a layer; to import peft takes seconds, and half of CUDA
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_tensors(policy: nn.Module) -> dict[str, str]:
    """Return, for every tensor of an adapter, the name of the weight that it adapts."""
    found = {}
    for layer, module in adapted_layers(policy):
        for name, _ in module.named_parameters():
            if not name.startswith("base_layer."):
                found[f"{layer}.{name}"] = f"{layer}.weight"
    return found


def quantise(policy: nn.Module, quantised: Mapping[str, Quantise]) -> None:
    """Round the weights of the layers in `quantised`.

    Raises StrategyError where adapters are there already.
    """
    require_bare(policy)
    for layer, how in quantised.items():
        quantise_layer(policy, layer, how)


def inject(policy: nn.Module, groups: Sequence[Group], seed: int = 0) -> None:
    """Put the adapters of `groups` into the policy, from `seed`.

    The policy's class and its base weights stay (PiSSA moves part of a weight into its adapter, and remembers
    the factors). Adapters are float32. The policy carries none yet.

    All are exact no-ops at the start but PiSSA, whose residual is rounded to the weight's dtype: to 1e-6 over
    float32, and over bfloat16 to what is then measured and logged.
    """
    if not groups:
        return
    from peft.functional import inject_adapter_in_model

    configs: dict[str, Any] = {}
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    exact = _imprecise_weights(policy, groups)
    devices = {p.device for p in policy.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed)
        for group in groups:
            config = configs[group.name] = peft_config(group)
            inject_adapter_in_model(config, policy, adapter_name=group.name)
            del policy.peft_config  # peft's mark: with the next group it would warn of a second adapter
            took = {name for name, module in adapted_layers(policy) if group.name in _names(module)}
            if took != set(group.layers):
                odd = sorted(took ^ set(group.layers))
                raise StrategyError(
                    f"adapter {group.name!r}: peft took other layers than the rules: {odd[:5]}"
                )
    attach(policy, Attached(configs))
    for _, layer in adapted_layers(policy):  # peft switched all of them to the last one's name
        layer.set_adapter(list(_names(layer)))
    for name, parameter in policy.named_parameters():  # peft froze the whole policy: the plan decides
        parameter.requires_grad_(before.get(base_name(name), True))
    tensors = dict(policy.named_parameters())
    for name in adapter_tensors(policy):
        if name.split(".")[-2] == "ranknum":
            tensors[name].requires_grad_(False)
        elif tensors[name].dtype != torch.float32:
            tensors[name].data = tensors[name].data.float()
    for group in groups:
        if group.adapter.init == "pissa":
            mine = [n for n in adapter_tensors(policy) if group_of(n) == group.name]
            _remember(policy, {n: tensors[n] for n in mine})
            _tell_deviation(policy, group, exact)
        if group.adapter.method == "dora":
            from vlafit.tuning import dora

            dora.begin(policy, group.name)


def _imprecise_weights(policy: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the weights that PiSSA is about to split and that are kept in less than float32, by layer."""
    layers = [layer for group in groups if group.adapter.init == "pissa" for layer in group.layers]
    weights = {layer: policy.get_parameter(f"{layer}.weight") for layer in layers}
    return {n: w.detach().clone() for n, w in weights.items() if w.dtype != torch.float32}


@torch.no_grad()
def _tell_deviation(policy: nn.Module, group: Group, exact: Mapping[str, Tensor]) -> None:
    """Log how far PiSSA's residual and factors together are from the weights that they were: rounding."""
    worst = 0.0
    for name, layer in adapted_layers(policy):
        if name in group.layers and name in exact:
            a, b = layer.lora_A[group.name].weight, layer.lora_B[group.name].weight
            weight = exact[name].float()
            off = layer.get_base_layer().weight.float() + layer.scaling[group.name] * b @ a - weight
            worst = max(worst, float(off.abs().max() / weight.abs().max()))
    if worst:
        log.warning(
            "adapter %s: PiSSA is no exact no-op over %s weights: residual and factors together are off by "
            "up to %.1e of a layer's largest weight, which is rounding; over float32 weights they are not",
            group.name, str(next(iter(exact.values())).dtype).removeprefix("torch."), worst,
        )  # fmt: skip


def require_bare(policy: nn.Module) -> None:
    """Raise StrategyError when the policy carries adapters already, or quantised weights without any."""
    first = next(adapted_layers(policy), None)
    if first is not None:
        raise StrategyError(
            f"the policy carries adapters already, at {first[0]}: merge them (vlafit.merge) or load the "
            "policy again, then apply a strategy"
        )
    rounded = quantised_names(policy)
    if rounded:
        raise StrategyError(
            f"the policy is quantised already, {min(rounded)} and {len(rounded) - 1} layers more: load it "
            "again, or make plain layers of the rounded values (vlafit.merge), then apply a strategy"
        )


def peft_config(group: Group) -> Any:
    """Return peft's config of a group, for exactly its layers."""
    import peft

    a, layers = group.adapter, sorted(group.layers)
    match a.method:
        case "lora" | "dora":
            config = peft.LoraConfig(
                r=a.rank,
                lora_alpha=a.scale,  # type: ignore[arg-type]  # peft divides it by the rank
                lora_dropout=a.dropout,
                use_rslora=a.rslora,
                use_dora=a.method == "dora",
                init_lora_weights={"default": True, "gaussian": "gaussian", "pissa": "pissa"}[a.init],  # type: ignore[arg-type]
                target_modules=layers,
                rank_pattern={f"^{k}": o.rank for k, o in group.layers.items() if o.rank != a.rank},
                alpha_pattern={f"^{k}": o.scale for k, o in group.layers.items() if o.scale != a.scale},
            )
        case "loha":
            config = peft.LoHaConfig(r=a.rank, alpha=a.scale, target_modules=layers)  # type: ignore[arg-type]
        case "lokr":
            config = peft.LoKrConfig(
                r=a.rank,
                alpha=a.scale,  # type: ignore[arg-type]
                decompose_factor=a.factor,
                target_modules=layers,
            )
        case "adalora":
            config = peft.AdaLoraConfig(
                init_r=a.rank,
                target_r=a.target_rank,
                lora_alpha=a.scale,  # type: ignore[arg-type]
                lora_dropout=a.dropout,
                orth_reg_weight=a.orthogonal,
                total_step=1,  # the run's own number is known to `ranks.py` alone
                target_modules=layers,
            )
        case "oft":
            config = peft.OFTConfig(oft_block_size=a.block, r=0, target_modules=layers)
        case "ia3":
            # The hidden activations of a feed-forward layer are scaled where they enter its second matrix
            # (arXiv 2205.05638, section 3.3); everywhere else the outputs are.
            inner = [name for name in layers if name.rpartition(".")[2] in ("down_proj", "fc2")]
            config = peft.IA3Config(target_modules=layers, feedforward_modules=inner)
        case "miss":
            config = peft.MissConfig(r=a.rank, miss_dropout=a.dropout, target_modules=layers)
    return config


def skeleton(policy: nn.Module) -> nn.Module:
    """Return a copy of the policy without storage, on the meta device."""
    stand_ins = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=t.requires_grad)
        for t in policy.parameters()
    }
    stand_ins |= {id(t): torch.empty_like(t, device="meta") for t in policy.buffers()}
    return copy.deepcopy(policy, stand_ins)


def adapter_shapes(policy: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what `inject` would add: tensor name -> the weight that it adapts, and its shape."""
    if not groups:
        return {}
    bare = skeleton(policy)
    inject(bare, [as_new(g) for g in groups])  # PiSSA would decompose weights that are not there
    tensors: Mapping[str, Tensor] = dict(bare.named_parameters())
    return {name: (base, tuple(tensors[name].shape)) for name, base in adapter_tensors(bare).items()}


def as_new(group: Group) -> Group:
    """Return the group with adapters that begin as no-ops and leave the weights below them alone."""
    layers = {name: replace(adapter, init="default") for name, adapter in group.layers.items()}
    return replace(group, adapter=replace(group.adapter, init="default"), layers=layers)


def group_of(name: str) -> str:
    """Return the adapter name in the live name of an adapter's tensor."""
    words = name.split(".")
    return words[-2] if words[-1] in ("weight", "bias") else words[-1]


def _remember(policy: nn.Module, factors: Mapping[str, Tensor]) -> None:
    had = attached(policy)
    new = {name: tensor.detach().clone() for name, tensor in factors.items()}
    attach(policy, replace(had, initial={**had.initial, **new}))


def initial_factors(policy: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the factors that PiSSA took out of the weights below `group` when it began, by live name."""
    kept = attached(policy).initial
    return {name: tensor for name, tensor in kept.items() if group_of(name) == group.name}


@torch.no_grad()
def take_residual(
    policy: nn.Module, group: Group, factors: Mapping[str, Tensor], stored: Collection[str] = ()
) -> None:
    """Take the initial `factors` of PiSSA out of the weights below `group`, as it did when it began.

    The same sum in the same order as peft's: on one machine the residual of float32 weights has the same
    bits. Weights named in `stored` are residuals, or what was trained of them, already.
    """
    for name, layer in adapted_layers(policy):
        if name in group.layers and f"{name}.weight" not in stored:
            base = layer.get_base_layer()
            base.weight.data = _residual(layer, name, group.name, factors, base.weight.data)
    _remember(policy, factors)


@torch.no_grad()
def is_residual(policy: nn.Module, layer: str, weight: Tensor) -> bool:
    """Whether what lies below a PiSSA adapter is `weight` without the initial factors, bit for bit."""
    module: Any = policy.get_submodule(layer)
    (group,) = module.scaling
    mine = module.get_base_layer().weight
    there = weight.to(mine.device, mine.dtype)
    return torch.equal(mine, _residual(module, layer, group, attached(policy).initial, there))


def _residual(layer: Any, name: str, group: str, factors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    a, b = (factors[f"{name}.lora_{x}.{group}.weight"].to(weight.device) for x in "AB")
    return (weight.float() - layer.scaling[group] * b @ a).to(weight.dtype)


def _names(module: Any) -> set[str]:
    """Return the names of the adapters in a peft layer."""
    return {key for part in module.adapter_layer_names for key in getattr(module, part)}
