"""Merge adapters into the weights that they adapt: the result is a plain policy with the same outputs."""

from typing import Any

import torch
from torch import nn

from vlafit.nn.attached import attach
from vlafit.nn.policy import Policy
from vlafit.tuning.inject import adapted_layers
from vlafit.tuning.quantise import dequantised, quantised_names


@torch.no_grad()
def merge(policy: Policy) -> Policy:
    """Merge every adapter into its layer, in place, and return the policy.

    The sum is computed in float32 and cast once to the layer's dtype. A quantised layer becomes a plain one
    with its dequantised weight, so the outputs are those that were trained. A policy with neither is
    unchanged, `requires_grad` included. Merged weights are in no file: `source` becomes None.
    """
    for name, layer in (adapted := list(adapted_layers(policy))):
        policy.set_submodule(name, _merged(layer))
    return _bare(policy, bool(adapted))


def remove(policy: Policy) -> Policy:
    """Remove every adapter, in place, and return the policy with its base weights.

    A quantised layer becomes a plain one with its dequantised weight. A policy with neither is unchanged.
    """
    for name, layer in (adapted := list(adapted_layers(policy))):
        policy.set_submodule(name, layer.get_base_layer())
    return _bare(policy, bool(adapted))


def _bare(policy: Policy, changed: bool) -> Policy:
    rounded = quantised_names(policy)
    if not (rounded or changed):
        return policy
    for name in rounded:
        policy.set_submodule(name, _plain(policy.get_submodule(name)))
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


def _plain(layer: Any) -> Any:
    """Return a plain linear layer for a quantised one; any other layer is returned itself."""
    weight = dequantised(layer)
    if weight is None:
        return layer
    dtype = getattr(layer, "compute_dtype", None) or weight.dtype
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().to(dtype))
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain
