"""Clip gradients by their norm, which is computed in float32 whatever their dtype is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlafit.train.distributed import full

PIECE = 2**22  # numbers that are copied to float32 at a time


def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Clip the gradient of all parameters together to `limit`, 0 for none; return its norm before."""
    limit = limit if limit > 0 else math.inf
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(gradient.dtype is torch.bfloat16 for gradient in gradients):
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(full(norm))  # sharded gradients, sharded norm
    norm = torch.stack([norm_of(gradient) for gradient in gradients]).norm()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def norm_of(gradient: Tensor) -> Tensor:
    """Return the norm of a gradient on one device, as float32."""
    pieces = gradient.reshape(-1).split(PIECE)
    norms = torch.empty(len(pieces), device=gradient.device)
    # Results of their own would lie between the copies, and malloc would find no room for the next one there.
    for i, piece in enumerate(pieces):
        norms[i] = piece.float().norm()
    return norms.norm()
