"""The soft-prompted transformer of X-VLA: all tokens see each other, and each domain has linear layers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.activations import gelu_tanh
from vlafit.nn.precision import in_own_precision, layer_norm

TIME_PERIOD = 100.0  # of the slowest wave of the embedded time: the authors' code


def time_waves(time: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, [..., width] of `time` [...]; float32, the last 0 where `width` is odd."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[..., None] * torch.exp(-math.log(TIME_PERIOD) * steps / half)
    return F.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, width % 2))


class DomainLinear(nn.Module):
    """A linear layer whose weight and bias are those of each sample's domain, a row of two tables."""

    def __init__(self, domains: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.fc = nn.Embedding(domains, inputs * outputs)
        self.bias = nn.Embedding(domains, outputs)

    @property
    def weight(self) -> Tensor:
        """The table of weights; a row is a matrix [inputs, outputs]."""
        return self.fc.weight

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """Return [b, l, outputs] for `x` [b, l, inputs] and `domain` int64 [b]."""
        weight, bias = self.fc(domain).unflatten(1, (self.inputs, -1)), self.bias(domain)
        return torch.baddbmm(bias[:, None].to(x.dtype), x, weight.to(x.dtype))


class JointAttention(nn.Module):
    """Multi-head attention among all tokens."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the update of `x` [b, l, d]; `mask` bool [b, 1, 1, l]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))


class JointMlp(nn.Module):
    """Two linear layers with GELU, approximated by tanh, between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, l, d]."""
        return self.drop(self.fc2(self.drop(gelu_tanh(self.fc1(x)))))


class JointLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = JointAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = JointMlp(width, hidden, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output [b, l, d]."""
        x = x + self.attn(layer_norm(self.norm1, x), mask)
        return x + self.mlp(layer_norm(self.norm2, x))


class JointTransformer(nn.Module):
    """Layers over all tokens, and projections of what enters; the caller adds positions and norms the end.

    With `domains` above 0, each domain has its own projections of `features` channels.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        positions: int,
        dropout: float,
        features: int,
        domains: int,
    ) -> None:
        super().__init__()
        if domains:
            self.vlm_proj: nn.Module = DomainLinear(domains, features, width)
            self.aux_visual_proj: nn.Module = DomainLinear(domains, features, width)
        else:
            self.vlm_proj = nn.Linear(features, width)
            self.aux_visual_proj = nn.Linear(features, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(JointLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def project(self, features: Tensor, views: Tensor, domain: Tensor) -> Tensor:
        """Return the tokens [b, l, d] of the language model's `features` and of the other `views`."""
        tokens = []
        for proj, x in ((self.vlm_proj, features), (self.aux_visual_proj, views)):
            if isinstance(proj, DomainLinear):
                tokens.append(in_own_precision(proj, x, domain))
            else:
                weight = proj.weight
                assert isinstance(weight, Tensor)
                tokens.append(proj(x.to(weight.dtype)))
        return torch.cat((tokens[0], tokens[1].to(tokens[0].dtype)), 1)
