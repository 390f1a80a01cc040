"""Compute each module in its own precision: a policy may hold float32 and bfloat16 weights side by side."""

import torch
from torch import Tensor, nn


def in_own_precision(module: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    """Call a linear `module` in its own weights' dtype (float32, as a rule), also under autocast.

    `rest` are further arguments, which keep their dtype.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = x.to(weight.dtype)
    if x.device.type == "meta":  # has no autocast of its own; see `meta_kernels`
        with torch._C.DisableTorchFunction():
            return module(x, *rest)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return module(x, *rest)
    return module(x, *rest)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply `norm` in the precision of its weights."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def precise(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def matrix_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the first matrix in `module`, which is that of its base weights.

    Where those are quantised it is the dtype of the first floats there are: an adapter's, or a norm's.
    """
    floats = [p for p in module.parameters() if p.is_floating_point()]
    return next((p.dtype for p in floats if p.ndim == 2), floats[0].dtype)
