"""How a leaf of openpi's JAX tree becomes our tensors, and these the leaf again: one layer at a time.

On tensors of the meta device the same functions give the shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """The conversion of one leaf."""

    to_vlafit: Callable[[Tensor], tuple[Tensor, ...]]
    """Makes our tensors of the leaf."""
    leaf: Callable[[tuple[Tensor, ...], int], Tensor]
    """Makes the leaf of our tensors, which have so many heads."""


def _key_value(x: Tensor) -> tuple[Tensor, ...]:
    key, value = (rearrange(half, "k d h -> (k h) d") for half in x)
    return key, value


def _gate_up(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = (half.T for half in x)
    return gate, up


SAME = Turn(lambda x: (x,), lambda x, n: x[0])
TRANSPOSED = Turn(lambda x: (x.T,), lambda x, n: x[0].T)
PATCHES = Turn(
    lambda x: (rearrange(x, "h w c d -> d c h w"),), lambda x, n: rearrange(x[0], "d c h w -> h w c d")
)
POSITIONS = Turn(lambda x: (rearrange(x, "1 l d -> l d"),), lambda x, n: rearrange(x[0], "l d -> 1 l d"))
INTO_HEADS = Turn(
    lambda x: (rearrange(x, "d n h -> (n h) d"),), lambda x, n: rearrange(x[0], "(n h) d -> d n h", n=n)
)
HEADS = Turn(lambda x: (rearrange(x, "n h -> (n h)"),), lambda x, n: rearrange(x[0], "(n h) -> n h", n=n))
OUT_OF_HEADS = Turn(
    lambda x: (rearrange(x, "n h d -> d (n h)"),), lambda x, n: rearrange(x[0], "d (n h) -> n h d", n=n)
)
QUERY = Turn(
    lambda x: (rearrange(x, "n d h -> (n h) d"),), lambda x, n: rearrange(x[0], "(n h) d -> n d h", n=n)
)
KEY_VALUE = Turn(_key_value, lambda x, n: torch.stack([rearrange(one, "(k h) d -> k d h", k=n) for one in x]))
GATE_UP = Turn(_gate_up, lambda x, n: torch.stack([one.T for one in x]))
