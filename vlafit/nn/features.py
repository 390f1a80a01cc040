"""Features of frozen modules, which a cache keeps instead of computing them in every epoch.

A policy declares them in `Policy.cacheable`, computes them in `Policy.features`, and reads them from
`Batch.features` in place of images and prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cacheable:
    """Modules whose output depends only on images and prompt, as long as nothing in them is trained."""

    kind: str
    """Its name, such as "prefix"."""
    modules: tuple[nn.Module, ...]
    of: Literal["tokens", "cameras"]
    """What the second axis of the features counts."""


@dataclass(frozen=True)
class Features:
    """The output of frozen modules for a batch."""

    kind: str
    tensors: tuple[Tensor, ...]
    """Each [b, u, ...], u counting tokens or cameras."""
    valid: Tensor | None = None
    """bool [b, u], False on padding and on missing cameras; None: all are real."""

    def to(self, device: torch.device | str) -> Features:
        """Return the features on `device`."""
        tensors = tuple(tensor.to(device, non_blocking=True) for tensor in self.tensors)
        valid = None if self.valid is None else self.valid.to(device, non_blocking=True)
        return replace(self, tensors=tensors, valid=valid)


def stacked(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of all layers, each [b, l, layers, g, d]."""
    return torch.stack([keys for keys, _ in layers], 2), torch.stack([values for _, values in layers], 2)


def unstacked(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [b, l, g, d] of each layer from what `stacked` returned."""
    keys, values = tensors
    return list(zip(keys.unbind(2), values.unbind(2), strict=True))
