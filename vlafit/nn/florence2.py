"""Florence-2's encoders: the DaViT image tower, the projector behind it, and BART's text encoder.

DaViT attends in turn among the pixels of a window and among groups of channels. Parameter names are those of
transformers' Florence2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.attention import attend
from vlafit.nn.detr import Attention
from vlafit.nn.precision import layer_norm, matrix_dtype

MLP_RATIO = 4  # of every DaViT block
POSITION_OFFSET = 2  # BART: the first position is row 2 of its table
PERIOD = 10_000.0  # of the slowest sine in the table of times


def conv_in_own_precision(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution in its weights' dtype, or as autocast decides, and return the dtype of `x`."""
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return conv(x.to(weight.dtype)).to(x.dtype)


class DropPath(nn.Module):
    """Drop whole updates of random images in training, and scale the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the update `x` [b, ...], 0 for some of the images."""
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class WindowAttention(nn.Module):
    """Attention among the pixels of each window.

    Windows at the right and bottom edges are filled with zeros, which are attended to like pixels.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, h, w, d]."""
        height, width, side = x.shape[1], x.shape[2], self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        windows = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        tokens = windows.flatten(3, 4).flatten(0, 2)  # [b * windows, side * side, d]
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = self.proj(attend(q, k, v)).unflatten(1, (side, side)).unflatten(0, (-1, rows, columns))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


class ChannelAttention(nn.Module):
    """Attention among the channels of each group, whose features are the pixels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [b, h, w, d]."""
        height, width = x.shape[1:3]
        packed = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.groups, -1))  # [b, n, 3, g, d/g]
        q, k, v = packed.permute(2, 0, 3, 4, 1).unbind(0)  # each [b, g, d/g, n]
        scores = torch.matmul(q * (height * width) ** -0.5, k.transpose(-1, -2))  # [b, g, d/g, d/g]
        out = torch.matmul(scores.softmax(-1).to(v.dtype), v)
        return self.proj(out.flatten(1, 2).transpose(1, 2).unflatten(1, (height, width)))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of `x` [..., d]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and an MLP, each after a depthwise convolution that adds positions.

    `name` is that of the attention among the parameters.
    """

    def __init__(self, width: int, name: str, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width)
        self.name = name
        self.add_module(name, attention)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for `x` [b, d, h, w]."""
        x = _to_last(x + conv_in_own_precision(self.conv1, x))  # [b, h, w, d]
        x = x + self.drop_path(self.get_submodule(self.name)(layer_norm(self.norm1, x)))
        x = _to_first(x)
        x = _to_last(x + conv_in_own_precision(self.conv2, x))
        return _to_first(x + self.drop_path(self.ffn(layer_norm(self.norm2, x))))


def _to_last(x: Tensor) -> Tensor:
    """Move the channels of `x` [b, d, h, w] to the end."""
    return x.permute(0, 2, 3, 1)


def _to_first(x: Tensor) -> Tensor:
    """Move the channels of `x` [b, h, w, d] behind b."""
    return x.permute(0, 3, 1, 2)


class DavitBlock(nn.Module):
    """A block among pixels, then one among channels."""

    def __init__(
        self, width: int, heads: int, groups: int, window: int, drop_paths: tuple[float, float]
    ) -> None:
        super().__init__()
        windows, channels = WindowAttention(width, heads, window), ChannelAttention(width, groups)
        self.spatial_block = Block(width, "window_attn", windows, drop_paths[0])
        self.channel_block = Block(width, "channel_attn", channels, drop_paths[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of both blocks for `x` [b, d, h, w]."""
        return self.channel_block(self.spatial_block(x))


class Downsample(nn.Module):
    """The convolution before a stage, with a norm of the channels that enter or leave it."""

    def __init__(
        self, inputs: int, width: int, kernel: int, stride: int, padding: int, norm_first: bool
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(inputs if norm_first else width)

    def forward(self, x: Tensor) -> Tensor:
        """Turn `x` [b, c, h, w] into [b, d, h / stride, w / stride]."""
        if self.norm_first:
            return conv_in_own_precision(self.conv, self._norm(x))
        return self._norm(conv_in_own_precision(self.conv, x))

    def _norm(self, x: Tensor) -> Tensor:
        return _to_first(layer_norm(self.norm, _to_last(x)))


class Davit(nn.Module):
    """Images [b, 3, h, w] to features [b, d, h / stride, w / stride].

    Every argument but `window` and `drop_path` has an entry for each stage; `depths` counts its blocks.
    """

    def __init__(
        self,
        width: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        groups: tuple[int, ...],
        window: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        norm_first: tuple[bool, ...],
        drop_path: float,
    ) -> None:
        super().__init__()
        inputs = (3, *width[:-1])
        self.convs = nn.ModuleList(
            Downsample(*sizes)
            for sizes in zip(inputs, width, kernel, stride, padding, norm_first, strict=True)
        )
        halves = 2 * sum(depths)
        rates = iter(drop_path * half / (halves - 1) for half in range(halves))  # they rise to the last
        self.blocks = nn.ModuleList(
            nn.ModuleList(DavitBlock(w, h, g, window, (next(rates), next(rates))) for _ in range(depth))
            for w, h, g, depth in zip(width, heads, groups, depths, strict=True)
        )

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of all stages in a row."""
        return [block for stage in self.blocks for block in _modules(stage)]

    def forward(self, images: Tensor) -> Tensor:
        """Encode each image by itself."""
        dtype = matrix_dtype(self.layers[0])
        x = images
        for conv, stage in zip(self.convs, self.blocks, strict=True):
            x = conv(x).to(dtype)
            for block in _modules(stage):
                x = block(x)
        return x


def _modules(stage: nn.Module) -> list[nn.Module]:
    assert isinstance(stage, nn.ModuleList)
    return list(stage)


def stage_side(side: int, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> int:
    """Return the side of DaViT's features for images with this side; below 1 where they are too small."""
    for size, step, border in zip(kernel, stride, padding, strict=True):
        side = (side + 2 * border - size) // step + 1
    return side


class ImagePositions(nn.Module):
    """Learned positions of the rows and columns of a feature map."""

    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(positions, channels // 2)
        self.column_embeddings = nn.Embedding(positions, channels - channels // 2)

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return positions [h, w, c]: first the column's, then the row's."""
        rows = self.row_embeddings(torch.arange(height, device=device))[:, None].expand(-1, width, -1)
        columns = self.column_embeddings(torch.arange(width, device=device))[None].expand(height, -1, -1)
        return torch.cat((columns, rows), -1)


class Projector(nn.Module):
    """Features [b, c, h, w] to tokens [b, 1 + h * w, d]: their mean, then one for each place.

    `visual_temporal_embed` is a constant table of sines, a parameter because checkpoints hold it; only its
    first row is read, because a view is one frame.
    """

    def __init__(self, channels: int, width: int, positions: int, frames: int) -> None:
        super().__init__()
        self.image_position_embed = ImagePositions(channels, positions)
        self.visual_temporal_embed = nn.Embedding(frames, channels)
        self.image_projection = nn.Linear(channels, width, bias=False)
        self.image_proj_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens of each image."""
        places = self.image_position_embed(x.shape[2], x.shape[3], x.device).to(x.dtype)
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        tokens = (_to_last(x) + places).flatten(1, 2) + self.visual_temporal_embed(first).to(x.dtype)
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), 1)
        return layer_norm(self.image_proj_norm, self.image_projection(tokens))


def sine_table(rows: int, width: int) -> Tensor:
    """Return the constant table of times [rows, width], float32: sines on even columns, cosines on odd."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.tensor(PERIOD).log() / half))
    angle = torch.arange(rows, dtype=torch.float32)[:, None] * frequency
    table = torch.zeros(rows, width)
    table[:, 0::2][:, :half] = angle.sin()
    table[:, 1::2][:, :half] = angle.cos()
    return table


class BartLayer(nn.Module):
    """Self-attention and an MLP with an exact GELU, each followed by a norm.

    `dropouts` are those of the updates, of attention's weights, and of the MLP's activations.
    """

    def __init__(self, width: int, heads: int, mlp: int, dropouts: tuple[float, float, float]) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropouts[1])
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.drop, self.drop_activations = nn.Dropout(dropouts[0]), nn.Dropout(dropouts[2])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output; `x` [b, l, d], `mask` bool [b, l]."""
        x = layer_norm(self.self_attn_layer_norm, x + self.drop(self.self_attn(x, x, x, mask)))
        update = self.fc2(self.drop_activations(F.gelu(self.fc1(x))))
        return layer_norm(self.final_layer_norm, x + self.drop(update))


class BartEncoder(nn.Module):
    """BART's encoder: learned positions, then layers. The embedding of `pad` never learns, as in BART."""

    def __init__(
        self,
        width: int,
        depth: int,
        mlp: int,
        heads: int,
        vocab: int,
        positions: int,
        dropouts: tuple[float, float, float],
        pad: int,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width, padding_idx=pad)
        self.embed_positions = nn.Embedding(positions + POSITION_OFFSET, width)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BartLayer(width, heads, mlp, dropouts) for _ in range(depth))
        self.drop = nn.Dropout(dropouts[0])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Encode embeddings `x` [b, l, d]; `mask` bool [b, l] says which of them are attended to."""
        rows = torch.arange(x.shape[1], device=x.device) + POSITION_OFFSET
        x = self.drop(layer_norm(self.layernorm_embedding, x + self.embed_positions(rows).to(x.dtype)))
        for layer in self.layers:
            x = layer(x, mask)
        return x
