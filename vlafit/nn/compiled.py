"""Compile the blocks of a policy by torch.compile, one at a time.

Blocks of one kind share their code, so a stack of layers is compiled once. Each set of shapes is compiled
anew: automatic dynamic shapes failed in a backward pass (torch 2.13, a mask's strides). So lengths should
come in few steps; see `text_multiple`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vlafit.nn.policy import Policy

SHAPES = 64  # sets of shapes and kinds of a block that are compiled before torch would fall back to eager
BUCKETS = 4  # lengths of prompts


def compile_blocks(policy: Policy, *, only_training: bool, backend: str = "inductor") -> None:
    """Compile every block of the policy, in place, at its first call.

    With `only_training` blocks in evaluation mode run as they are: a validation is too short to pay for
    compiling.
    """
    if policy.compiled:
        return
    policy.compiled = True
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * SHAPES)
    for block in policy.blocks():
        compiled = torch.compile(block.forward, dynamic=False, backend=backend)
        block.forward = partial(_call, compiled, block.forward, block if only_training else None)


def text_multiple(max_tokens: int) -> int:
    """Return what the length of a trimmed prompt is a multiple of, so that only few lengths are compiled."""
    return max(16, -(-max_tokens // BUCKETS // 16) * 16)


def _call(
    compiled: Callable[..., Any],
    eager: Callable[..., Any],
    block: nn.Module | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if block is not None and not block.training:
        return eager(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        return compiled(*args, **kwargs)
