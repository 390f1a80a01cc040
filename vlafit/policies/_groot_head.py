"""GR00T's action head: projectors with weights for each embodiment, and a diffusion transformer (DiT).

Even blocks of the transformer attend to the backbone's features, to text and to images in turn, odd blocks
among the tokens of state and actions. Norms are adaptive: scaled and shifted by the time. Dropout comes after
attention twice, as in the reference: once in its output layer, once in the block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.activations import gelu_tanh, silu
from vlafit.nn.attention import attend, key_mask
from vlafit.nn.precision import in_own_precision, layer_norm, precise

EPS = 1e-5  # of the norms; reference implementation
LAST_EPS = 1e-6  # of the last norm; reference implementation
FREQUENCIES = 128  # of the transformer's own time embedding; reference implementation
LOG_PERIOD = math.log(10_000.0)  # of the longest period of the time embeddings
FOLD = 4  # width of a feed-forward layer, relative to that of its block


@dataclass(frozen=True)
class Rows:
    """Which rows of the embodiment tables are used, and which of them each sample takes."""

    used: tuple[int, ...]
    of_sample: Tensor | None
    """int64 [b], indices into `used`; None: the first."""


class EmbodimentLinear(nn.Module):
    """A linear layer for each embodiment."""

    def __init__(self, count: int, width: int, out_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out_width) for _ in range(count))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return [b, ..., out] for `x` [b, ..., w]."""
        results = [in_own_precision(self.layers[row], x) for row in rows.used]
        out = results[0]
        if rows.of_sample is not None:
            chosen = rows.of_sample.view(-1, *(1,) * (x.ndim - 1))
            for number, result in enumerate(results[1:], start=1):
                out = torch.where(chosen == number, result, out)
        return out


class EmbodimentMLP(nn.Module):
    """Two layers with a ReLU between, for each embodiment."""

    def __init__(self, count: int, width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.first = EmbodimentLinear(count, width, hidden)
        self.second = EmbodimentLinear(count, hidden, out_width)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return [b, ..., out] for `x` [b, ..., w]."""
        return self.second(F.relu(self.first(x, rows)), rows)


class ActionEncoder(nn.Module):
    """Noisy actions and their time to tokens, for each embodiment."""

    def __init__(self, count: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = EmbodimentLinear(count, action_dim, width)
        self.second = EmbodimentLinear(count, 2 * width, width)
        self.third = EmbodimentLinear(count, width, width)

    def forward(self, actions: Tensor, bucket: Tensor, rows: Rows) -> Tensor:
        """Return tokens [b, k, t, w] for `actions` [b, k, t, a] at the time `bucket` [b, k]."""
        x = self.first(actions, rows)
        time = action_time(bucket, self.width).to(x.dtype)[:, :, None]
        x = torch.cat((x, time.expand_as(x)), -1)
        return self.third(silu(self.second(x, rows)), rows)


class TimeEncoder(nn.Module):
    """The transformer's own embedding of time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, bucket: Tensor) -> Tensor:
        """Return [b, k, w] for the time `bucket` [b, k]."""
        x = in_own_precision(self.fc1, transformer_time(bucket))
        return in_own_precision(self.fc2, silu(x))


def action_time(bucket: Tensor, width: int) -> Tensor:
    """Return sines, then cosines, [..., width] float32, of `bucket` [...]."""
    steps = torch.arange(width // 2, dtype=torch.float32, device=bucket.device)
    angles = _angles(bucket, -steps * float(np.float32(LOG_PERIOD) / np.float32(width // 2)))
    return torch.cat((angles.sin(), angles.cos()), -1)


def transformer_time(bucket: Tensor) -> Tensor:
    """Return cosines, then sines, [..., 256] float32, of `bucket` [...]; the last period is 10000."""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=bucket.device)
    angles = _angles(bucket, -LOG_PERIOD * steps / (FREQUENCIES - 1))
    return torch.cat((angles.cos(), angles.sin()), -1)


def _angles(bucket: Tensor, exponents: Tensor) -> Tensor:
    """Return `bucket` [...] times exp(`exponents` [n]), float32 [..., n].

    They reach 999, where roundings of the frequencies show. The exponents are rounded to float32 step by step
    as in the reference, and their powers exactly, which no float32 `exp` of all builds does.
    """
    return bucket[..., None].float() * exponents.double().exp().float()


class Attention(nn.Module):
    """Multi-head attention with biases, and dropout of its result."""

    def __init__(self, width: int, key_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(key_width, width)
        self.v_proj = nn.Linear(key_width, width)
        self.out_proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from `x` [b, s, w] to `memory` [b, l, v]; `mask` bool [b, l].

        A sample that sees nothing gets zeros, before the output layer.
        """
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k, v = (p(memory).unflatten(-1, (self.heads, -1)) for p in (self.k_proj, self.v_proj))
        if mask is None:
            return self.drop(self.out_proj(attend(q, k, v)))
        sees = mask.any(-1, keepdim=True)  # [b, 1]
        out = attend(q, k, v, key_mask(mask | ~sees))
        return self.drop(self.out_proj(torch.where(sees[..., None], out, 0.0)))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, FOLD * width)
        self.fc2 = nn.Linear(FOLD * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [..., w]."""
        return self.drop(self.fc2(self.drop(gelu_tanh(self.fc1(x)))))


class MemoryLayer(nn.Module):
    """A layer of self-attention among the backbone's features."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = FeedForward(width, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output for `x` [b, l, w]; `mask` bool [b, l] says which tokens are seen."""
        y = layer_norm(self.norm1, x)
        x = x + self.drop(self.attn(y, y, mask))
        return x + self.mlp(layer_norm(self.norm2, x))


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift come from the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return the normalised `x` [b, k, s, w], for `cond` [b, k, w]."""
        scale, shift = precise(in_own_precision(self.dense, cond)[:, :, None]).chunk(2, -1)
        return torch.addcmul(shift, plain_norm(x, EPS), 1.0 + scale).to(x.dtype)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """Return `x` [..., w] with mean 0 and variance 1, in float32 at least."""
    return F.layer_norm(precise(x), x.shape[-1:], eps=eps)


class Block(nn.Module):
    """A block of the transformer: attention to the backbone's features, or among its own tokens."""

    def __init__(self, width: int, key_width: int | None, heads: int, dropout: float) -> None:
        super().__init__()
        self.crosses = key_width is not None
        self.norm = AdaptiveNorm(width)
        self.attn = Attention(width, key_width or width, heads, dropout)
        self.mlp = FeedForward(width, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cond: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return the block's output for `x` [b, k, s, w] of k draws, which do not see each other."""
        b, k = x.shape[:2]
        y = self.norm(x, cond)
        if self.crosses:
            update = self.attn(y.flatten(1, 2), memory, mask).unflatten(1, (k, -1))
        else:
            y = y.flatten(0, 1)
            update = self.attn(y, y, None).unflatten(0, (b, k))
        x = x + self.drop(update)
        return x + self.mlp(plain_norm(x, EPS).to(x.dtype))


class Transformer(nn.Module):
    """The diffusion transformer. Its output has the width `out_width`."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        key_width: int,
        out_width: int,
        text_every: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.text_every = text_every
        self.layers = nn.ModuleList(
            Block(width, key_width if i % 2 == 0 else None, heads, dropout) for i in range(depth)
        )
        self.last_norm = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, out_width)

    def forward(self, x: Tensor, time: Tensor, memory: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Return [b, k, s, out] for `x` [b, k, s, w] at the embedded `time` [b, k, w].

        `masks` are those of the text's and of the images' features in `memory` [b, l, v], each bool [b, l].
        """
        cond = silu(time)
        for i, layer in enumerate(self.layers):
            x = layer(x, cond, memory, masks[0 if i % (2 * self.text_every) == 0 else 1])
        # The reference has the shift before the scale here, and the scale before the shift in the blocks.
        shift, scale = precise(in_own_precision(self.last_norm, cond)[:, :, None]).chunk(2, -1)
        y = torch.addcmul(shift, plain_norm(x, LAST_EPS), 1.0 + scale)
        return in_own_precision(self.out_proj, y)
