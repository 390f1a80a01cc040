"""Recompute activations in the backward pass instead of keeping them, block by block.

"full" keeps only what enters a block. "selective" keeps the results of matrix products and attention, too,
and recomputes what lies between them: norms, activations, casts, rotations, and products of low rank, such as
an adapter's. The numbers are the same, dropout included, because the random state is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vlafit.nn.policy import Policy

Recompute = Literal["auto", "none", "selective", "full"]

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results are kept by "selective": they cost much to compute."""
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
LOW_RANK = 128  # sums of fewer products are cheap beside what their results take


def recompute_blocks(policy: Policy, how: Recompute) -> None:
    """Let every block of the policy recompute its activations, in place."""
    if how not in ("selective", "full"):
        return
    for block in policy.blocks():
        block.forward = partial(_recomputed, block.forward, how == "selective")


def _recomputed(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if selective:
        contexts = partial(create_selective_checkpoint_contexts, _keeps)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _keeps(context: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT and not (operation in PRODUCTS and args[-2].shape[-1] < LOW_RANK)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
