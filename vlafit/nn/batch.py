"""What a policy takes: torch, normalised, padded, masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlafit.errors import CodecError

if TYPE_CHECKING:
    from vlafit.codec import Encoded


FIELDS = {  # axes and kind of each field
    "images": ("b n 3 h w", "images"),
    "image_mask": ("b n", "mask"),
    "tokens": ("b l", "tokens"),
    "token_mask": ("b l", "mask"),
    "state": ("b s", "float"),
    "actions": ("b t a", "float"),
    "action_mask": ("b t a", "mask"),
}
OPTIONAL = ("actions", "action_mask")
KINDS = {
    "images": "uint8, or floating-point in [-1, 1]",
    "mask": "bool",
    "tokens": "int64 or int32",
    "float": "floating-point",
}


@dataclass
class Batch:
    """One batch of b samples.

    `images` [b, n, 3, h, w], uint8, or float in [-1, 1]; `image_mask` bool [b, n], False where a camera is
    missing; `tokens` int64 or int32 [b, l]; `token_mask` bool [b, l], False on padding; `state` float [b, s],
    normalised and padded; `actions` float [b, t, a], normalised and padded, or None when acting;
    `action_mask` bool [b, t, a], False where the loss does not look (None: it looks everywhere).
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    actions: Tensor | None = None
    action_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise CodecError naming the first field that is of another kind or has another number of axes."""
        for name, (axes, kind) in FIELDS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, Tensor):
                raise CodecError(f"batch.{name} must be a tensor, {KINDS[kind]}, not {type(value).__name__}")
            dtype = str(value.dtype).removeprefix("torch.")
            if value.ndim != len(axes.split()):
                raise CodecError(
                    f"batch.{name} has the shape {tuple(value.shape)}; it must have {len(axes.split())} axes,"
                    f" [{axes}]"
                )
            if not _is_kind(value, kind):
                raise CodecError(f"batch.{name} is of dtype {dtype}; it must be {KINDS[kind]}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on `device`, its uint8 images turned there into floats in [-1, 1].

        `dtype` (float32 unless given) is that of the images; state and actions stay float32.
        """
        actions, mask = self.actions, self.action_mask
        return Batch(
            images=unit_images(self.images.to(device, non_blocking=True), dtype or torch.float32),
            image_mask=self.image_mask.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            token_mask=self.token_mask.to(device, non_blocking=True),
            state=self.state.to(device, non_blocking=True),
            actions=None if actions is None else actions.to(device, non_blocking=True),
            action_mask=None if mask is None else mask.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (a DataLoader calls this by name)."""
        values = {k: v.pin_memory() for k, v in vars(self).items() if v is not None}
        return replace(self, **values)

    def trim(self, multiple: int = 16) -> Batch:
        """Drop cameras that are missing in every row, and prompt padding beyond a multiple of `multiple`.

        Positions count real tokens only, so the result of a policy does not change. Call it while the batch
        is on the CPU: it looks at the masks. One camera and `multiple` tokens always stay.
        """
        seen = self.image_mask.any(0)
        if not seen.any():
            seen[0] = True
        used = int((self.token_mask.any(0) * torch.arange(1, self.tokens.shape[1] + 1)).max())
        length = min(-(-max(used, 1) // multiple) * multiple, self.tokens.shape[1])
        return replace(
            self,
            images=self.images if seen.all() else self.images[:, seen],
            image_mask=self.image_mask if seen.all() else self.image_mask[:, seen],
            tokens=self.tokens[:, :length],
            token_mask=self.token_mask[:, :length],
        )


def _is_kind(value: Tensor, kind: str) -> bool:
    if kind == "mask":
        return value.dtype == torch.bool
    if kind == "tokens":
        return value.dtype in (torch.int64, torch.int32)
    return value.is_floating_point() or (kind == "images" and value.dtype == torch.uint8)


def unit_images(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 images as floats in [-1, 1]; float images pass, cast to `dtype`."""
    if images.dtype == torch.uint8:
        return (images.to(torch.float32) / 255 * 2 - 1).to(dtype)
    return images.to(dtype)


def seen_images(images: Tensor, mask: Tensor) -> Tensor:
    """Return images [b, n, 3, h, w] as `unit_images` does, one after the other, [b * n, 3, h, w].

    Those that `mask` [b, n] leaves out are 0: masked attention gives them no weight, but 0 times NaN is NaN.
    """
    if images.is_floating_point():
        images = torch.where(mask[:, :, None, None, None], images, 0.0)
    return unit_images(images.flatten(0, 1))


def stack(encoded: Sequence[Encoded]) -> Batch:
    """Collate what the codec made of single samples.

    Raises CodecError when there are none, or when some have actions and some have not.
    """
    if not encoded:
        raise CodecError("no samples to stack: a batch needs at least one")

    def join(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays))

    with_actions = [e.actions for e in encoded if e.actions is not None]
    masks = [e.action_mask for e in encoded if e.action_mask is not None]
    for what, have in (("actions", with_actions), ("an action mask", masks)):
        if len(have) not in (0, len(encoded)):
            raise CodecError(
                f"only {len(have)} of {len(encoded)} samples of a batch have {what}: give all or none"
            )
    return Batch(
        images=join([e.images for e in encoded]),
        image_mask=join([e.image_mask for e in encoded]),
        tokens=join([e.tokens for e in encoded]),
        token_mask=join([e.token_mask for e in encoded]),
        state=join([e.state for e in encoded]),
        actions=join(with_actions) if with_actions else None,
        action_mask=join(masks) if masks else None,
    )
