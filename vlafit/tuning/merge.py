"""Merge adapters into the weights that they adapt: the result is a plain policy with the same outputs."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vlafit.nn.attached import attach
from vlafit.nn.deferred import Deferred, defer, is_deferred
from vlafit.nn.policy import Policy
from vlafit.tuning.inject import adapted_layers
from vlafit.tuning.quantise import dequantised, quantised_names


@torch.no_grad()
def merge(policy: Policy) -> Policy:
    """Merge every adapter into its layer, in place, and return the policy.

    The sum is computed in float32 and cast once to the layer's dtype. A quantised layer becomes a plain one
    with its dequantised weight, so the outputs are those that were trained. A policy with neither is
    unchanged, `requires_grad` included. Merged weights are in no file: `source` becomes None. Where weights
    are deferred, merged ones are, too.
    """
    later = is_deferred(policy)
    for name, layer in (adapted := list(adapted_layers(policy))):
        policy.set_submodule(name, _merged_when_used(layer) if later else _merged(layer))
    return _bare(policy, bool(adapted))


def remove(policy: Policy) -> Policy:
    """Remove every adapter, in place, and return the policy with its base weights.

    A quantised layer becomes a plain one with its dequantised weight. A policy with neither is unchanged.
    """
    for name, layer in (adapted := list(adapted_layers(policy))):
        policy.set_submodule(name, layer.get_base_layer())
    return _bare(policy, bool(adapted))


def _bare(policy: Policy, changed: bool) -> Policy:
    rounded, later = quantised_names(policy), is_deferred(policy)
    if not (rounded or changed):
        return policy
    for name in rounded:
        policy.set_submodule(name, _plain(policy.get_submodule(name), later))
    attach(policy, None)
    policy.source = None
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    return policy


def _merged(layer: Any) -> nn.Module:
    base = _plain(layer.get_base_layer())
    dtype = base.weight.dtype
    if base is not layer.get_base_layer():  # peft's quantised layers would round the sum again
        (name,) = layer.active_adapters
        base.weight.data = (base.weight.float() + layer.get_delta_weight(name).float()).to(dtype)
        return base
    base.weight.data = base.weight.data.float()
    layer.merge(safe_merge=True)  # checks that the sum is finite
    merged = layer.get_base_layer()
    merged.weight.data = merged.weight.data.to(dtype)
    return merged


def _merged_when_used(layer: Any) -> nn.Module:
    """Return the layer without its adapter, whose weight is merged whenever it is used."""
    base = _plain(layer.get_base_layer(), later=True)
    plain: Any = copy.copy(base)
    plain._parameters = dict(base._parameters)
    if base is not layer.get_base_layer():
        (name,) = layer.active_adapters

        def weight() -> Tensor:
            return base.weight.float() + layer.get_delta_weight(name).float()

    else:
        biases = {n: p for n, p in _merged_copies(layer).items() if n != "weight"}  # is the sum finite, too?
        plain._parameters |= {n: nn.Parameter(p.to(base._parameters[n].dtype)) for n, p in biases.items()}

        def weight() -> Tensor:
            return _merged_copies(layer)["weight"]

    merged = Deferred(weight, base.weight.shape, torch.float32).cast(base.weight.dtype)
    plain._parameters["weight"] = nn.Parameter(merged)
    return plain


def _merged_copies(layer: Any) -> dict[str, Tensor]:
    """Return the layer's parameters merged, in float32; the layer stays as it is."""
    base = layer.get_base_layer()
    own = {name: p for name, p in base._parameters.items() if p is not None}
    try:
        for name, parameter in own.items():
            base._parameters[name] = nn.Parameter(defer(parameter).value().float().clone())
        layer.merge(safe_merge=True)  # checks that the sum is finite
        return {name: base._parameters[name].data for name in own}
    finally:
        base._parameters.update(own)
        layer.merged_adapters.clear()


def _plain(layer: Any, later: bool = False) -> Any:
    """Return a plain linear layer for a quantised one; any other layer is returned itself."""
    weight = dequantised(layer)
    if weight is None:
        return layer
    dtype = getattr(layer, "compute_dtype", None) or weight.dtype
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    if later:
        shape, made = weight.shape, weight.dtype
        weight = Deferred(lambda: _floats(layer), shape, made).cast(dtype)
    plain.weight = nn.Parameter(weight if later else weight.detach().to(dtype))
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


def _floats(layer: Any) -> Tensor:
    weight = dequantised(layer)
    assert weight is not None
    return weight
