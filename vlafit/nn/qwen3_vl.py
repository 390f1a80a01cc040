"""Qwen3-VL for still images and one prompt: image tower, mergers, and the text decoder.

The tower puts the patches of each 2x2 square next to each other, and hands out features after some of its
layers ("deepstack"), which the decoder adds to its image tokens after its first layers. Positions have three
axes: time, row and column. Names inside the tower are ours, those of the decoder transformers'. Checked
against recorded features of transformers' Qwen3VLModel (`tests/policies/test_groot.py`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.attention import Rope, attend, per_query, rotate
from vlafit.nn.llama import MLP, RMSNorm
from vlafit.nn.precision import in_own_precision, layer_norm, matrix_dtype
from vlafit.nn.siglip import SiglipMLP

EPS = 1e-6  # Qwen3-VL: epsilon of every norm
TOWER_BASE = 10_000.0  # Qwen3-VL: rotary base frequency of the image tower
FRAMES = 2  # temporal patch: a still image fills both frames
AXES = 3  # time, row, column


class TowerAttention(nn.Module):
    """Attention among the patches of one image, with rotary positions of row and column."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Return the update of `x` [b, l, w]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out_proj(attend(rotate(q, rope), rotate(k, rope), v))


class TowerLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = TowerAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = SiglipMLP(width, hidden)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Return the layer's output [b, l, w]."""
        x = x + self.self_attn(layer_norm(self.norm1, x), rope)
        return x + self.mlp(layer_norm(self.norm2, x))


class Tower(nn.Module):
    """Images [b, 3, h, h] in [-1, 1] to patch features [b, (h / patch)^2, w], in squares of `merge`.

    `side` is that of the square table of learned positions, which is interpolated to the grid of patches.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        mlp: int,
        heads: int,
        *,
        patch: int,
        merge: int,
        side: int,
        image_size: int,
        deepstack: Sequence[int],
    ) -> None:
        super().__init__()
        self.patch, self.merge, self.deepstack = patch, merge, tuple(deepstack)
        self.patch_embedding = nn.Linear(3 * FRAMES * patch * patch, width)
        self.position_embedding = nn.Embedding(side * side, width)
        self.layers = nn.ModuleList(TowerLayer(width, mlp, heads) for _ in range(depth))
        rows, columns = _merge_order(image_size // patch, merge)
        index, share = _interpolated(rows, columns, image_size // patch, side)
        cos, sin = _grid_rope(rows, columns, width // heads)
        for name, value in (("index", index), ("share", share), ("cos", cos), ("sin", sin)):
            self.register_buffer(name, value, persistent=False)

    index: Tensor
    share: Tensor
    cos: Tensor
    sin: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output, and those of the deepstack layers; each [b, l, w]."""
        x = in_own_precision(self.patch_embedding, self.patches(images))
        x = x + (self.position_embedding(self.index) * self.share[..., None]).sum(0)  # [b, l, w]
        x = x.to(matrix_dtype(self.layers[0]))
        rope, kept = (self.cos, self.sin), []
        for number, layer in enumerate(self.layers):
            x = layer(x, rope)
            if number in self.deepstack:
                kept.append(x)
        return x, kept

    def patches(self, images: Tensor) -> Tensor:
        """Return the pixels of each patch [b, l, 3 * 2 * p * p]: channel, frame, row, column."""
        p, m = self.patch, self.merge
        b, _, height, width = images.shape
        x = images.reshape(b, 3, height // (p * m), m, p, width // (p * m), m, p)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)  # [b, l, 3, p, p]
        return x[:, :, :, None].expand(-1, -1, -1, FRAMES, -1, -1).flatten(2)


class Merger(nn.Module):
    """Four neighbouring patches to one token of the decoder; `joined`: normed after they are joined."""

    def __init__(self, width: int, out_width: int, merge: int, joined: bool) -> None:
        super().__init__()
        self.joined, self.fold = joined, merge * merge
        self.norm = nn.LayerNorm(width * self.fold if joined else width, eps=EPS)
        self.fc1 = nn.Linear(width * self.fold, width * self.fold)
        self.fc2 = nn.Linear(width * self.fold, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [b, l / 4, out] for patches [b, l, w]."""
        if self.joined:
            x = layer_norm(self.norm, self._join(x))
        else:
            x = self._join(layer_norm(self.norm, x))
        return self.fc2(F.gelu(self.fc1(x)))

    def _join(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.fold)).flatten(2)


class Attention(nn.Module):
    """Grouped-query attention with a norm for each head's queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = RMSNorm(head_dim, EPS)
        self.k_norm = RMSNorm(head_dim, EPS)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        """Return the update of `x` [b, s, w]; `mask` is as `attend` takes it."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v, mask))


class DecoderLayer(nn.Module):
    """One layer of the text decoder."""

    def __init__(self, width: int, mlp: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads, head_dim)
        self.mlp = MLP(width, mlp)
        self.input_layernorm = RMSNorm(width, EPS)
        self.post_attention_layernorm = RMSNorm(width, EPS)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor, valid: Tensor | None) -> Tensor:
        """Return the layer's output [b, s, w]. Tokens that are not `valid` [b, s] attend to nothing."""
        update = self.self_attn(self.input_layernorm(x), rope, mask)
        x = x + (update if valid is None else torch.where(valid[..., None], update, 0.0))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The text decoder, with causal attention. `norm` is kept for checkpoints: its input is what is read."""

    def __init__(
        self,
        width: int,
        depth: int,
        mlp: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        vocab: int,
        base: float,
        sections: Sequence[int],
    ) -> None:
        super().__init__()
        self.base, self.group, self.head_dim = base, heads // kv_heads, head_dim
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(DecoderLayer(width, mlp, heads, kv_heads, head_dim) for _ in range(depth))
        self.norm = RMSNorm(width, EPS)
        self.register_buffer("axis", _axis_of_frequency(head_dim, sections), persistent=False)

    axis: Tensor

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor | None, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the last layer's output [b, s, w], before the final norm, for `x` [b, s, w].

        `positions` int64 [b, s, 3] are time, row and column, and `valid` bool [b, s] says which tokens are
        real (None: all). `added[i]` [b, s, w] is added after layer i.
        """
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = positions[..., self.axis].float() * (1.0 / self.base**steps)  # [b, s, d/2]
        rope = angles.cos()[:, :, None], angles.sin()[:, :, None]
        s = x.shape[1]
        mask = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()[None]
        if valid is not None:  # a token that is not real has to see something, of which nothing is used
            mask = (mask & valid[:, None]) | torch.eye(s, dtype=torch.bool, device=x.device)
        mask = per_query(mask, self.group)
        for number, layer in enumerate(self.layers):
            x = layer(x, rope, mask, valid)
            if number < len(added):
                x = x + added[number]
        return x


def _merge_order(grid: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return row and column [l] of each patch, one square of `merge` x `merge` patches after the other."""
    places = torch.arange(grid * grid).view(grid // merge, merge, grid // merge, merge)
    places = places.permute(0, 2, 1, 3).flatten()
    return places // grid, places % grid


def _interpolated(rows: Tensor, columns: Tensor, grid: int, side: int) -> tuple[Tensor, Tensor]:
    """Return the four rows of the position table for each patch, and the share of each; both [4, l].

    The corners of the grid lie on the corners of the table.
    """
    at = torch.linspace(0, side - 1, grid)
    low = at.long()
    high = (low + 1).clamp(max=side - 1)
    part = at - low
    index, share = [], []
    for row, of_row in ((low, 1 - part), (high, part)):
        for column, of_column in ((low, 1 - part), (high, part)):
            index.append(row[rows] * side + column[columns])
            share.append(of_row[rows] * of_column[columns])
    return torch.stack(index), torch.stack(share)


def _grid_rope(rows: Tensor, columns: Tensor, head_dim: int) -> Rope:
    """Return cosines and sines [1, l, 1, d/2]: half of the frequencies for rows, half for columns."""
    half = head_dim // 2
    frequencies = 1.0 / TOWER_BASE ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), -1)  # [l, d/2]
    return angles.cos()[None, :, None], angles.sin()[None, :, None]


def _axis_of_frequency(head_dim: int, sections: Sequence[int]) -> Tensor:
    """Return which axis each rotary frequency counts, [d/2]: interleaved time, row, column."""
    axis = torch.zeros(head_dim // 2, dtype=torch.int64)
    for i in range(head_dim // 2):
        if i % AXES and i < AXES * sections[i % AXES]:
            axis[i] = i % AXES
    return axis
