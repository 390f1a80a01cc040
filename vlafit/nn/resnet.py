"""A ResNet of basic blocks, ResNet-18 by default, up to its last feature map."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["frozen_batch", "group"]

EPS = 1e-5  # torchvision: FrozenBatchNorm2d and BatchNorm2d
GROUP = 16  # channels of a group: GroupNorm paper


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics and fixed scales: constants that a checkpoint holds.

    A family reports its four tensors as dead, because they never learn.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [b, c, h, w]."""
        scale = self.weight * (self.running_var + EPS).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Return the norm of a convolution's `channels` outputs."""
    if kind == "frozen_batch":
        return FrozenBatchNorm(channels)
    return nn.GroupNorm(max(1, channels // GROUP), channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = make_norm(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem and four stages, each with half the resolution and twice the channels of the one before."""

    def __init__(self, width: int, blocks: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm1 = make_norm(norm, width)
        stages, inputs = [], width
        for number, count in enumerate(blocks):
            outputs, stride = width * 2**number, 1 if number == 0 else 2
            first = BasicBlock(inputs, outputs, stride, norm)
            stages.append(
                nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, norm) for _ in range(count - 1)))
            )
            inputs = outputs
        self.layers = nn.ModuleList(stages)
        self.channels = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [b, 3, h, w] to features [b, c, h/32, w/32] (with four stages; rounded up)."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 3, 2, 1)
        for stage in self.layers:
            x = stage(x)
        return x
