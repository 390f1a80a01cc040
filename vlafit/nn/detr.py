"""Transformer layers as DETR has them: post-norm, with positions added to queries and keys in every layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.precision import layer_norm

EPS = 1e-5  # torch's LayerNorm
PERIOD = 10_000.0  # of the slowest sine: DETR


def sine_positions(count: int, width: int, device: torch.device) -> Tensor:
    """Return positions [count, width] of a sequence: sines on even channels, cosines on odd ones."""
    channel = torch.arange(width, dtype=torch.float64, device=device)
    angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] / _period(channel, width)
    return _interleaved(angle).float()


def sine_positions_2d(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return positions [height * width, channels] of a feature map: first half by row, second by column.

    Rows and columns count from 1 and are divided by the last, so that another size moves every position.
    """
    half = channels // 2
    period = _period(torch.arange(half, dtype=torch.float32, device=device), half)

    def axis(count: int) -> Tensor:
        index = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        return _interleaved((index / (count + 1e-6) * 2 * math.pi)[:, None] / period)  # [count, half]

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)


def _period(channel: Tensor, width: int) -> Tensor:
    return PERIOD ** (2 * (channel // 2) / width)


def _interleaved(angle: Tensor) -> Tensor:
    """Return the sines of the even columns of `angle` and the cosines of the odd ones, in their places."""
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with dropout of its weights."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from `query` [b, s, d] to `key`, `value` [b, l, d]; `mask` bool [b, l], False: not there."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, h, s or l, d/h]
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, l, d]."""
        return self.fc2(self.drop(F.relu(self.fc1(x))))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.mlp = FeedForward(width, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output; `x` [b, l, d], `positions` [l, d], `mask` bool [b, l]."""
        placed = x + positions
        x = layer_norm(self.norm1, x + self.drop(self.self_attn(placed, placed, x, mask)))
        return layer_norm(self.norm2, x + self.drop(self.mlp(x)))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's output, and a feed-forward layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.mlp = FeedForward(width, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.norm3 = nn.LayerNorm(width, EPS)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the layer's output; `x` [b, t, d], `memory` [b, l, d], `mask` bool [b, l]."""
        placed = x + positions
        x = layer_norm(self.norm1, x + self.drop(self.self_attn(placed, placed, x, None)))
        seen = self.cross_attn(x + positions, memory + memory_positions, memory, mask)
        x = layer_norm(self.norm2, x + self.drop(seen))
        return layer_norm(self.norm3, x + self.drop(self.mlp(x)))
