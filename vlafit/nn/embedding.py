"""Embedding tables without weights."""

import torch
from torch import nn


def undrawn_embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding whose weights are undefined until they are drawn or loaded.

    `nn.Embedding(rows, width)` draws them, and to draw on the meta device imports torch._dynamo: two seconds
    at every start.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
