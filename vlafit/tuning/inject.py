"""Inject peft adapters into a policy in place, one adapter name for each group of equal settings.

peft implements the layers; `plan.py` decides which layers are adapted and what is trained. peft wraps an
adapted layer, whose own tensors are then below `base_layer`. `base_name` undoes that, so that a tensor has
the same name in plans and checkpoints with or without an adapter.
"""

import copy
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlafit.errors import StrategyError
from vlafit.nn.attached import Attached, attach, attached
from vlafit.tuning.adapters import Adapter, Layer, Quantise
from vlafit.tuning.quantise import quantise_layer, quantised_names

log = logging.getLogger(__name__)

PER_MODULE = ("lora", "dora")  # peft sets rank and alpha of these by module


@dataclass(frozen=True)
class Group:
    """Layers that share one adapter name and one PEFT folder."""

    name: str
    adapter: Adapter
    """Shared settings; rank and alpha of LoRA and DoRA may differ by layer."""
    layers: Mapping[str, Adapter]
    """Layer name -> its own settings."""


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
    """Return the type of the layer whose weight is `name`; None if it is not the weight of such a layer."""
    owner, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    module = policy.get_submodule(owner)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d) and module.groups == 1:  # peft cannot merge into groups
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def base_name(name: str) -> str:
    """Return the name that a tensor of the policy has when nothing is adapted."""
    return name.replace(".base_layer.", ".")


def adapted_layers(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every layer that carries an adapter."""
    if "peft" not in sys.modules:  # no such layer exists; importing peft takes seconds
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_tensors(policy: nn.Module) -> dict[str, str]:
    """Return adapter tensor name -> name of the weight that it adapts."""
    adapts = {}
    for layer, module in adapted_layers(policy):
        for name, _ in module.named_parameters():
            if not name.startswith("base_layer."):
                adapts[f"{layer}.{name}"] = f"{layer}.weight"
    return adapts


def quantise(policy: nn.Module, quantised: Mapping[str, Quantise]) -> None:
    """Quantise the weights of the layers in `quantised`.

    Raises StrategyError if the policy has adapters already.
    """
    require_bare(policy)
    for layer, how in quantised.items():
        quantise_layer(policy, layer, how)


def inject(policy: nn.Module, groups: Sequence[Group], seed: int = 0) -> None:
    """Add the adapters of `groups`, initialised from `seed`, to a policy that has none.

    The policy's class and base weights are unchanged (PiSSA moves part of a weight into its adapter, and the
    policy keeps those factors). Adapters are float32.

    All are exactly the identity at the start except PiSSA, whose residual is rounded to the weight's dtype:
    1e-6 over float32; over bfloat16 the error is measured and logged.
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
            del policy.peft_config  # else peft warns of a second adapter with the next group
            adapted = {name for name, module in adapted_layers(policy) if group.name in _names(module)}
            if adapted != set(group.layers):
                differing = sorted(adapted ^ set(group.layers))
                raise StrategyError(
                    f"adapter {group.name!r}: peft adapted other layers than the rules select: "
                    f"{differing[:5]}"
                )
    attach(policy, Attached(configs))
    for _, layer in adapted_layers(policy):  # peft left only the last group active
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
        if group.adapter.method == "oft":
            from vlafit.tuning.oft_rotation import rotate_last_dimension

            for name in group.layers:
                rotate_last_dimension(policy.get_submodule(name))
        if group.adapter.init == "pissa":
            factors = {n: tensors[n] for n in adapter_tensors(policy) if group_of(n) == group.name}
            _keep_initial(policy, factors)
            _log_rounding(policy, group, exact)
        if group.adapter.method == "dora":
            from vlafit.tuning import dora

            dora.begin(policy, group.name)


def _imprecise_weights(policy: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the weights, by layer, that PiSSA is about to split and whose dtype is not float32."""
    layers = [layer for group in groups if group.adapter.init == "pissa" for layer in group.layers]
    weights = {layer: policy.get_parameter(f"{layer}.weight") for layer in layers}
    return {n: w.detach().clone() for n, w in weights.items() if w.dtype != torch.float32}


@torch.no_grad()
def _log_rounding(policy: nn.Module, group: Group, exact: Mapping[str, Tensor]) -> None:
    """Log how far residual + factors of PiSSA are from the original weights, which is rounding."""
    worst = 0.0
    for name, layer in adapted_layers(policy):
        if name in group.layers and name in exact:
            a, b = layer.lora_A[group.name].weight, layer.lora_B[group.name].weight
            weight = exact[name].float()
            error = layer.get_base_layer().weight.float() + layer.scaling[group.name] * b @ a - weight
            worst = max(worst, float(error.abs().max() / weight.abs().max()))
    if worst:
        log.warning(
            "adapter %s: PiSSA is not exactly the identity over %s weights: rounding changes a layer by up "
            "to %.1e of its largest weight; load the base in float32 to avoid that",
            group.name, str(next(iter(exact.values())).dtype).removeprefix("torch."), worst,
        )  # fmt: skip


def require_bare(policy: nn.Module) -> None:
    """Raise StrategyError if the policy already has adapters or quantised weights."""
    first = next(adapted_layers(policy), None)
    if first is not None:
        raise StrategyError(
            f"the policy already has adapters, for example on {first[0]}: merge them (vlafit.merge) or load "
            "the policy again before applying a strategy"
        )
    rounded = quantised_names(policy)
    if rounded:
        raise StrategyError(
            f"the policy is already quantised ({min(rounded)} and {len(rounded) - 1} more layers): load it "
            "again, or dequantise it (vlafit.merge), before applying a strategy"
        )


def peft_config(group: Group) -> Any:
    """Return peft's config for exactly the layers of a group."""
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
                total_step=1,  # only `ranks.py` knows the length of the run
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


def save_config(config: Any, folder: Path) -> None:
    """Write peft's `config` as adapter_config.json.

    Sets of layers are sorted: equal adapters have equal files in any process.
    """
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def skeleton(module: nn.Module) -> nn.Module:
    """Return a copy of the module on the meta device, without storage."""
    stand_ins = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=t.requires_grad)
        for t in module.parameters()
    }
    stand_ins |= {id(t): torch.empty_like(t, device="meta") for t in module.buffers()}
    return copy.deepcopy(module, stand_ins)


_SHAPES: dict[object, dict[str, tuple[int, ...]]] = {}
"""Kind of layer with its adapter -> shapes of that. A run asks several times: plan, forecast, apply."""


def adapter_shapes(policy: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what `inject` would add: tensor name -> (name of the weight that it adapts, shape).

    peft adapts one layer of each kind, not the whole policy: of hundreds of layers some twenty differ.
    """
    if not groups:
        return {}
    chosen = {layer: (group, adapter) for group in groups for layer, adapter in group.layers.items()}
    shapes = {}
    for layer, module in policy.named_modules():
        if layer not in chosen:
            continue
        group, adapter = chosen[layer]
        leaf = layer.rpartition(".")[2]  # IA3 goes by it
        tensors = [(name, tensor.dtype, tensor.shape) for name, tensor in module.named_parameters()]
        kind = (leaf, group.name, adapter, type(module), module.extra_repr(), *tensors)
        if kind not in _SHAPES:
            _SHAPES[kind] = _layer_shapes(leaf, module, Group(group.name, adapter, {leaf: adapter}))
        for name, shape in _SHAPES[kind].items():
            shapes[f"{layer}.{name}"] = f"{layer}.weight", shape
    return shapes


def _layer_shapes(leaf: str, module: nn.Module, group: Group) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `inject` would add to one layer, by name within the layer."""
    holder = nn.Module()
    holder.add_module(leaf, skeleton(module))
    inject(holder, [as_new(group)])  # meta weights have no values for PiSSA to split
    tensors: Mapping[str, Tensor] = dict(holder.named_parameters())
    return {name.removeprefix(f"{leaf}."): tuple(tensors[name].shape) for name in adapter_tensors(holder)}


def as_new(group: Group) -> Group:
    """Return the group with the default init, which leaves the base weights unchanged."""
    layers = {name: replace(adapter, init="default") for name, adapter in group.layers.items()}
    return replace(group, adapter=replace(group.adapter, init="default"), layers=layers)


def group_of(name: str) -> str:
    """Return the adapter name in the name of an adapter's tensor."""
    words = name.split(".")
    return words[-2] if words[-1] in ("weight", "bias") else words[-1]


def _keep_initial(policy: nn.Module, factors: Mapping[str, Tensor]) -> None:
    current = attached(policy)
    new = {name: tensor.detach().clone() for name, tensor in factors.items()}
    attach(policy, replace(current, initial={**current.initial, **new}))


def initial_factors(policy: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the factors that PiSSA first subtracted from the weights of `group`, by tensor name."""
    factors = attached(policy).initial
    return {name: tensor for name, tensor in factors.items() if group_of(name) == group.name}


@torch.no_grad()
def take_residual(
    policy: nn.Module, group: Group, factors: Mapping[str, Tensor], stored: Collection[str] = ()
) -> None:
    """Subtract the initial `factors` of PiSSA from the weights of `group`, as at injection.

    The sum has the same order as peft's: on one machine the residual of float32 weights is bit-identical.
    Weights named in `stored` already are residuals, or residuals that were trained.
    """
    for name, layer in adapted_layers(policy):
        if name in group.layers and f"{name}.weight" not in stored:
            base = layer.get_base_layer()
            base.weight.data = _residual(layer, name, group.name, factors, base.weight.data)
    _keep_initial(policy, factors)


@torch.no_grad()
def is_residual(policy: nn.Module, layer: str, weight: Tensor) -> bool:
    """Tell whether the weight below a PiSSA adapter is `weight` minus the initial factors, bit for bit."""
    module: Any = policy.get_submodule(layer)
    (group,) = module.scaling
    base = module.get_base_layer().weight
    original = weight.to(base.device, base.dtype)
    return torch.equal(base, _residual(module, layer, group, attached(policy).initial, original))


def _residual(layer: Any, name: str, group: str, factors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    a, b = (factors[f"{name}.lora_{x}.{group}.weight"].to(weight.device) for x in "AB")
    return (weight.float() - layer.scaling[group] * b @ a).to(weight.dtype)


def compute_adapters_in_bf16(policy: nn.Module) -> None:
    """Let autocast choose the precision of LoRA's products, whose weights stay float32.

    peft casts the inputs to the weights' dtype, which autocast undoes: twice the traffic for the same
    numbers.
    """
    for _, layer in adapted_layers(policy):
        layer.cast_input_dtype_enabled = False


def _names(module: Any) -> set[str]:
    """Return the names of the adapters in a peft layer."""
    return {key for part in module.adapter_layer_names for key in getattr(module, part)}
