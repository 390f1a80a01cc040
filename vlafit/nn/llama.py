"""The Llama decoder for two passes, with layers that may attend only to an earlier pass.

What differs from `vlafit.nn.gemma`: norms multiply by their weight, the feed-forward layer's gate is SiLU,
and a *cross* layer has no keys and values of its own tokens: it projects those of the earlier pass anew.
Parameter names are those of transformers; rotary positions are LeRobot's (base 10000, whatever the model's
config says).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlafit.nn.activations import silu
from vlafit.nn.attention import Rope, attend, rope_tables, rotate
from vlafit.nn.gemma import Attention, KeysValues, Mask
from vlafit.nn.precision import precise

EPS = 1e-5  # SmolLM2: RMSNorm epsilon


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; computes in float32 at least."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` [..., w]."""
        y = precise(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * precise(self.weight)).to(x.dtype)


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, s, w]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class CrossAttention(nn.Module):
    """Attention only over an earlier pass, whose rotated keys and values are projected once more."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        rows = kv_heads * head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(rows, rows, bias=False)
        self.v_proj = nn.Linear(rows, rows, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, past: KeysValues) -> Tensor:
        """Return the update of `x` [b, s, w]; `mask` is over the keys of `past`."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        k, v = (
            proj(one.flatten(2).to(x.dtype)).unflatten(-1, (-1, self.head_dim))
            for proj, one in zip((self.k_proj, self.v_proj), past, strict=True)
        )
        return self.o_proj(attend(q, k, v, mask))


@dataclass(frozen=True)
class View:
    """Where the tokens of a pass stand, and what they see: `mask` is as `attend` takes it."""

    positions: Tensor  # int64 [b or 1, s]
    mask: Mask


class DecoderLayer(nn.Module):
    """One layer; with `cross` it attends only to the earlier pass."""

    def __init__(
        self,
        width: int,
        mlp: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cross: bool = False,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        kind = CrossAttention if cross else Attention
        self.self_attn = kind(width, heads, kv_heads, head_dim)
        self.mlp = MLP(width, mlp)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask, past: KeysValues | None, output: bool = True
    ) -> tuple[Tensor | None, KeysValues | None]:
        """Return the layer's output [b, s, w] (None unless `output`), and its own keys and values if any."""
        y = self.input_layernorm(x)
        own = None
        if isinstance(self.self_attn, CrossAttention):
            assert past is not None
            update = self.self_attn(y, rope, mask, past)
        else:
            update, own = self.self_attn(y, rope, mask, past, output)
            if update is None:
                return None, own
        x = x + update
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Decoder(nn.Module):
    """A stack of layers, with a token embedding when `vocab` is not None.

    Layers whose number is no multiple of `self_every` are cross layers; 1: there are none, 0: all are.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        mlp: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        self_every: int = 1,
        vocab: int | None = None,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.crosses = tuple(self_every == 0 or i % self_every != 0 for i in range(depth))
        if vocab is not None:
            self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, mlp, heads, kv_heads, head_dim, cross, eps) for cross in self.crosses
        )
        self.norm = RMSNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        view: View,
        past: Sequence[KeysValues] | None = None,
        cross: View | None = None,
        output: bool = True,
    ) -> tuple[Tensor | None, list[KeysValues]]:
        """Run all layers over `x` [b, s, w].

        Each layer also attends to `past`, the keys and values of the same layer in an earlier pass. `cross`
        is the view of the cross layers, which need `past`. Without `output` only the keys and values are
        wanted: the last layer's query, output and MLP and the final norm are not computed.

        Returns the normed output [b, s, w] (None unless `output`), and each self layer's own keys and values.
        """
        rope = rope_tables(view.positions, self.head_dim)
        cross_rope = None if cross is None else rope_tables(cross.positions, self.head_dim)
        own: list[KeysValues] = []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            before = None if past is None else past[i]
            if self.crosses[i]:
                assert cross is not None and cross_rope is not None
                y, _ = layer(x, cross_rope, cross.mask, before)
            else:
                y, keys_values = layer(x, rope, view.mask, before, output or i < last)
                own.append(keys_values)
            x = x if y is None else y
        return (self.norm(x) if output else None), own
