"""Attention bricks: rotary positions, grouped-query attention, and the masks of the two passes.

Queries of one key/value head are folded into the query axis, so that grouped keys and values are never
repeated in memory. Masks are boolean, True where a query may look, and broadcast over what they do not
name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlafit.nn.packing import Segments, attend_packed
from vlafit.nn.precision import precise

ROPE_BASE = 10_000.0  # Gemma: rotary base frequency
QUERY_TILE = 128  # queries that a fused kernel gives to one multiprocessor
HALF = (torch.bfloat16, torch.float16)
FEW_TILES = 32  # of 132 on an H100
ALIGNED = 8  # keys: products of rows that are no multiple of it take twice the time on an H200

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each float32 [b or 1, l, 1, d/2]."""


def rope_tables(positions: Tensor, head_dim: int) -> Rope:
    """Return float32 cosines and sines of `positions` (int64 [b, l]) for heads of `head_dim` dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # Divided, not multiplied by the inverse: at position 800 float32 rounds the two 1e-5 apart, and openpi's
    # JAX code, which the published weights come from, and LeRobot's SmolVLA divide.
    angles = positions[..., None].float() / ROPE_BASE**exponents  # [b, l, d/2]
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply rotary positions to `x` [b, l, h, d], the halves of d forming the pairs; float32 at least."""
    cos, sin = rope
    one, two = precise(x).chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None = None) -> Tensor:
    """Attend from `q` [b, s, h, d] to `k`, `v` [b, l, g, d], where g divides h; return [b, s, h*d].

    `mask` is bool [b or 1, 1, 1, l] (only keys), or [b or 1, 1, s*h/g, l]: see `per_query`. With `Segments`
    q, k and v are packed rows.
    """
    if isinstance(mask, Segments):
        return attend_packed(q, k, v, mask, attend)
    b, s, h, d = q.shape
    g = k.shape[2]
    if g == 1 or h == g:
        folded = q.reshape(b, s * h // g, g, d).transpose(1, 2)  # [b, g, s*h/g, d], a view
    else:
        folded = q.unflatten(2, (g, h // g)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    attention = _few_queries if _is_small(folded) else F.scaled_dot_product_attention
    out = attention(folded, k.transpose(1, 2), v.transpose(1, 2), mask)
    if g == 1 or h == g:
        return out.transpose(1, 2).reshape(b, s, h * d)
    return out.unflatten(2, (s, h // g)).transpose(1, 2).reshape(b, s, h * d)


def _is_small(q: Tensor) -> bool:
    """Tell whether `q` [b, g, s, d] leaves a GPU's fused kernels idle, where no gradient is wanted."""
    b, g, s, _ = q.shape
    few = b * g * -(-s // QUERY_TILE) < FEW_TILES
    return few and q.is_cuda and q.dtype in HALF and not torch.is_grad_enabled()


def _few_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as the fused kernels do, with scores and softmax in float32, by products that share the keys.

    A fused kernel gives each tile of queries to one multiprocessor, which then reads all keys by itself.
    """
    b, g = q.shape[:2]
    missing = -k.shape[2] % ALIGNED
    if missing:
        mask = q.new_ones(1, 1, 1, k.shape[2], dtype=torch.bool) if mask is None else mask
        k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
        mask = F.pad(mask, (0, missing), value=False)
    product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    scores = product.unflatten(0, (b, g)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def per_query(mask: Tensor, heads_per_group: int) -> Tensor:
    """Turn a mask [b or 1, s, l] into the form that `attend` takes, one row for each folded query."""
    return mask.repeat_interleave(heads_per_group, dim=1)[:, None]


def key_mask(valid: Tensor) -> Tensor:
    """Turn bool [b, l], True for real tokens, into a mask over keys [b, 1, 1, l]."""
    return valid[:, None, None]


def draw_blocks(head: int, draws: int, length: int, device: torch.device) -> Tensor:
    """Return the mask [s, s] inside a suffix: `head` shared tokens, then `draws` blocks of `length`.

    The shared tokens see themselves; every block sees the shared tokens and itself, and no other block.
    """
    block = torch.arange(draws, device=device).repeat_interleave(length) + 1
    block = torch.cat([torch.zeros(head, dtype=block.dtype, device=device), block])
    return (block[None] == 0) | (block[None] == block[:, None])
