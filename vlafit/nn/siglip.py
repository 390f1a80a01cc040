"""The SigLIP image tower: patches to tokens, no pooling. Parameter names are those of transformers."""

import torch
from torch import Tensor, nn

from vlafit.nn.activations import gelu_tanh
from vlafit.nn.attention import attend
from vlafit.nn.precision import in_own_precision, layer_norm, matrix_dtype

EPS = 1e-6  # SigLIP: LayerNorm epsilon


class SiglipAttention(nn.Module):
    """Multi-head attention among the patches of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, l, w]."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v))


class SiglipMLP(nn.Module):
    """Feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, l, w]."""
        return self.fc2(gelu_tanh(self.fc1(x)))


class SiglipLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = SiglipAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = SiglipMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [b, l, w]."""
        x = x + self.self_attn(layer_norm(self.layer_norm1, x))
        return x + self.mlp(layer_norm(self.layer_norm2, x))


class SiglipTower(nn.Module):
    """Images [b, 3, h, h] in [-1, 1] to patch features [b, (h / patch)^2, w]."""

    def __init__(self, width: int, depth: int, mlp: int, heads: int, patch: int, image_size: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding((image_size // patch) ** 2, width)
        self.layers = nn.ModuleList(SiglipLayer(width, mlp, heads) for _ in range(depth))
        self.post_layernorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode each image by itself; patches and positions are embedded in float32.

        `positions` int64 [l] says which row of the position table each patch takes; None: one after the
        other.
        """
        patches = in_own_precision(self.patch_embedding, images)
        if positions is None:
            positions = torch.arange(patches.shape[2] * patches.shape[3], device=images.device)
        x = patches.flatten(2).transpose(1, 2) + self.position_embedding(positions)  # [b, l, w]
        x = x.to(matrix_dtype(self.layers[0]))
        for layer in self.layers:
            x = layer(x)
        return layer_norm(self.post_layernorm, x)
