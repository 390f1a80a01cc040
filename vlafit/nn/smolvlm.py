"""SmolVLM's additions to a SigLIP tower: images of another size than its own, and fewer, wider tokens."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def patch_positions(side: int, table_side: int) -> Tensor:
    """Return which row of a tower's position table each of side^2 patches takes, int64 [side^2].

    The table was learned for table_side^2 patches; others take the row at the same fraction of the image. The
    arithmetic is transformers' own (float32 bucketing in SmolVLMVisionEmbeddings), roundings included.
    """
    step = 1.0 / torch.tensor(side)
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side)
    fractions = (torch.arange(side, dtype=torch.float32) * step).clamp(max=1.0 - 1e-6)
    rows = torch.bucketize(fractions, boundaries, right=True)
    return (rows[:, None] * table_side + rows[None]).flatten()


class Connector(nn.Module):
    """Folds `shuffle` x `shuffle` neighbouring patches into one token of the language width."""

    def __init__(self, vision_width: int, width: int, shuffle: int) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.proj = nn.Linear(vision_width * shuffle**2, width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Turn patches [b, l, v] of square images into tokens [b, l / shuffle^2, w]."""
        rows = math.isqrt(patches.shape[1]) // self.shuffle
        folded = rearrange(
            patches, "b (h p w q) v -> b (h w) (p q v)", h=rows, w=rows, p=self.shuffle, q=self.shuffle
        )
        return self.proj(folded)
