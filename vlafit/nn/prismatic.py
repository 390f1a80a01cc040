"""The image towers of Prismatic VLMs: DINOv2 and SigLIP on the same picture, their features side by side.

Both are ViTs as timm has them: queries, keys and values from one matrix, an exact GELU also in SigLIP
(transformers approximates it there), and no norm after the second-to-last block, whose output is taken. What
lies behind it (the last block, the final norm, SigLIP's pooling) feeds nothing and is kept because
checkpoints hold it. With FiLM the instruction scales and shifts the tokens inside
every block: OpenVLA-OFT, arXiv 2502.19645.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.attention import attend
from vlafit.nn.precision import in_own_precision, layer_norm, matrix_dtype

EPS = 1e-6  # timm, vision_transformer.py: LayerNorm epsilon
PROJECTOR_RATIO = 4  # prismatic, FusedMLPProjector: width of its first layer


@dataclass(frozen=True)
class TowerSizes:
    """The sizes of one ViT."""

    width: int
    depth: int
    mlp: int
    heads: int


class LayerScale(nn.Module):
    """A factor for each channel of an update."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` [..., w]."""
        return x * self.weight.to(x.dtype)


class FusedAttention(nn.Module):
    """Multi-head attention among the tokens of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, l, w]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [b, l, h, d]
        return self.out_proj(attend(q, k, v))


class MLP(nn.Module):
    """Feed-forward layer with an exact GELU."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., o] for `x` [..., w]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Film(nn.Module):
    """Scale and shift of the tokens of a block, from the mean embedding of the instruction."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(words, width)
        self.shift = nn.Linear(words, width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Modulate `x` [b, l, w] by `words` [b, d]."""
        scale, shift = (in_own_precision(layer, words)[:, None] for layer in (self.scale, self.shift))
        return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, sizes: TowerSizes, scaled: bool, words: int | None) -> None:
        super().__init__()
        w = sizes.width
        self.norm1 = nn.LayerNorm(w, eps=EPS)
        self.self_attn = FusedAttention(w, sizes.heads)
        self.scale1 = LayerScale(w) if scaled else None
        self.norm2 = nn.LayerNorm(w, eps=EPS)
        self.mlp = MLP(w, sizes.mlp, w)
        self.scale2 = LayerScale(w) if scaled else None
        self.film = None if words is None else Film(words, w)

    def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
        """Return the layer's output [b, l, w]; `words` [b, d] is for FiLM."""
        update = self.self_attn(layer_norm(self.norm1, x))
        x = x + (update if self.scale1 is None else self.scale1(update))
        if self.film is not None and words is not None:
            x = self.film(x, words)
        update = self.mlp(layer_norm(self.norm2, x))
        return x + (update if self.scale2 is None else self.scale2(update))


class Pooling(nn.Module):
    """Parameters of SigLIP's attention pooling, which Prismatic does not use."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        w = sizes.width
        self.latent = nn.Embedding(1, w)
        self.q = nn.Linear(w, w)
        self.kv = nn.Linear(w, 2 * w)
        self.out_proj = nn.Linear(w, w)
        self.norm = nn.LayerNorm(w, eps=EPS)
        self.mlp = MLP(w, sizes.mlp, w)


class Tower(nn.Module):
    """A ViT. `registers` is None for SigLIP, which has neither registers nor a class token."""

    def __init__(
        self, sizes: TowerSizes, patch: int, image_size: int, registers: int | None, words: int | None
    ) -> None:
        super().__init__()
        w = sizes.width
        self.patch_embedding = nn.Conv2d(3, w, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding((image_size // patch) ** 2, w)
        self.class_embedding = None if registers is None else nn.Embedding(1, w)
        self.register_embedding = nn.Embedding(registers, w) if registers else None
        self.layers = nn.ModuleList(
            Block(sizes, scaled=registers is not None, words=words) for _ in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(w, eps=EPS)
        self.pooling = Pooling(sizes) if registers is None else None

    def forward(self, images: Tensor, words: Tensor | None = None) -> Tensor:
        """Return the features [b, l, w] of images [b, 3, h, h], normalised as the tower wants them.

        `words` [b, d] is for FiLM. Patches and positions are embedded in float32.
        """
        patches = in_own_precision(self.patch_embedding, images).flatten(2).transpose(1, 2)  # [b, l, w]
        x = patches + self.position_embedding(torch.arange(patches.shape[1], device=images.device))
        first = [
            table(torch.arange(len(table.weight), device=images.device)).to(x.dtype)
            for table in (self.class_embedding, self.register_embedding)
            if table is not None
        ]
        count = sum(len(tokens) for tokens in first)
        x = torch.cat([*(tokens[None].expand(len(x), -1, -1) for tokens in first), x], 1)
        x = x.to(matrix_dtype(self.layers[0].get_submodule("self_attn")))
        for layer in self.layers[:-1]:
            x = layer(x, words)
        return x[:, count:]


class Towers(nn.Module):
    """Both towers."""

    def __init__(
        self,
        dino: TowerSizes,
        siglip: TowerSizes,
        patch: int,
        image_size: int,
        registers: int,
        words: int | None,
    ) -> None:
        super().__init__()
        self.dino = Tower(dino, patch, image_size, registers, words)
        self.siglip = Tower(siglip, patch, image_size, None, words)

    def forward(self, for_dino: Tensor, for_siglip: Tensor, words: Tensor | None = None) -> Tensor:
        """Return the features [b, l, v] of the same images [b, 3, h, h] as each tower wants them."""
        return torch.cat((self.dino(for_dino, words), self.siglip(for_siglip, words)), -1)


class FusedProjector(nn.Module):
    """Three layers from the features of both towers to the language model's width."""

    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, PROJECTOR_RATIO * vision)
        self.fc2 = nn.Linear(PROJECTOR_RATIO * vision, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [b, l, d] of features [b, l, v]."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
