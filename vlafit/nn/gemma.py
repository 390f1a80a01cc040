"""The Gemma decoder for two passes: it yields keys and values, and attends to those of an earlier pass.

Norms are plain RMSNorm, or adaptive: scaled, shifted and gated by a condition (pi0.5's time). Parameter
names are those of the reference implementations. Norms, rotary positions and the adaptive norms' dense
layers compute in float32 at least, whatever the precision around them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlafit.nn.activations import gelu_tanh
from vlafit.nn.attention import Rope, attend, rope_tables, rotate
from vlafit.nn.packing import Segments
from vlafit.nn.precision import in_own_precision, precise

EPS = 1e-6  # Gemma: RMSNorm epsilon

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys, and values, of one layer: each [b, l, g, d]."""
Mask = Tensor | Segments | None
"""As `attend` takes it: which keys are seen, or the rows that are packed."""


def _normalise(x: Tensor) -> Tensor:
    x = precise(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight 1 + w, w being stored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the normalised `x` [b, s, w], and no gate; `cond` is not used."""
        return (_normalise(x) * (1.0 + precise(self.weight))).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """Root-mean-square norm whose scale, shift and gate come from a condition."""

    def __init__(self, width: int, cond_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(cond_width, 3 * width)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the normalised `x` [b, k*t, w] and its gate [b, k, 1, w], for `cond` [b, k, c]."""
        assert cond is not None
        modulation = precise(in_own_precision(self.dense, cond)[:, :, None])
        scale, shift, gate = modulation.chunk(3, -1)  # [b, k, 1, w]
        y = _normalise(x).unflatten(1, (cond.shape[1], -1))
        return torch.addcmul(shift, y, 1.0 + scale).flatten(1, 2).to(x.dtype), gate.to(x.dtype)


def _add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return x + update
    return x + (update.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over its own tokens and those of an earlier pass."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask, past: KeysValues | None, output: bool
    ) -> tuple[Tensor | None, KeysValues]:
        """Return the update of `x` [b, s, w] (None unless `output`), and the layer's own keys and values."""
        own_k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        own_v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if not output:
            return None, (own_k, own_v)
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        k, v = own_k, own_v
        if past is not None:
            k, v = torch.cat((past[0].to(k.dtype), k), 1), torch.cat((past[1].to(v.dtype), v), 1)
        return self.o_proj(attend(q, k, v, mask)), (own_k, own_v)


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, s, w]."""
        return self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One Gemma layer; adaptive norms when `cond_width` is not None."""

    def __init__(
        self, width: int, mlp: int, heads: int, kv_heads: int, head_dim: int, cond_width: int | None
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads, head_dim)
        self.mlp = MLP(width, mlp)
        self.input_layernorm = _norm(width, cond_width)
        self.post_attention_layernorm = _norm(width, cond_width)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Mask,
        past: KeysValues | None = None,
        cond: Tensor | None = None,
        output: bool = True,
    ) -> tuple[Tensor | None, KeysValues]:
        """Return the layer's output [b, s, w] (None unless `output`), and its own keys and values."""
        y, gate = self.input_layernorm(x, cond)
        update, own = self.self_attn(y, rope, mask, past, output)
        if update is None:
            return None, own
        x = _add(x, update, gate)
        y, gate = self.post_attention_layernorm(x, cond)
        return _add(x, self.mlp(y), gate), own


class Decoder(nn.Module):
    """A stack of Gemma layers, with a token embedding when `vocab` is not None."""

    def __init__(
        self,
        width: int,
        depth: int,
        mlp: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cond_width: int | None = None,
        vocab: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        if vocab is not None:
            self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, mlp, heads, kv_heads, head_dim, cond_width) for _ in range(depth)
        )
        self.norm = _norm(width, cond_width)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Mask = None,
        past: Sequence[KeysValues] | None = None,
        cond: Tensor | None = None,
        output: bool = True,
    ) -> tuple[Tensor | None, list[KeysValues]]:
        """Run all layers over `x` [b, s, w] at `positions` [b or 1, s].

        Each layer also attends to `past`, the keys and values of the same layer in an earlier pass. Without
        `output` only the keys and values are wanted: the last layer's query, output and MLP and the final
        norm are not computed.

        Returns the normed output [b, s, w] (None unless `output`), and each layer's own keys and values.
        """
        rope = rope_tables(positions, self.head_dim)
        own: list[KeysValues] = []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            y, keys_values = layer(x, rope, mask, None if past is None else past[i], cond, output or i < last)
            own.append(keys_values)
            x = x if y is None else y
        return (self.norm(x, cond)[0] if output else None), own


def _norm(width: int, cond_width: int | None) -> nn.Module:
    return RMSNorm(width) if cond_width is None else AdaptiveRMSNorm(width, cond_width)
