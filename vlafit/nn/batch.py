"""The input of a policy: torch tensors, normalised, padded, masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlafit.errors import CodecError
from vlafit.nn.features import Features
from vlafit.nn.packing import Kernel, Packing, PrefixShape, packing_of

if TYPE_CHECKING:
    from vlafit.codec import Encoded


FIELDS = {  # axes and kind of each field
    "images": ("b n 3 h w", "images"),
    "image_mask": ("b n", "mask"),
    "state": ("b s", "float"),
    "history_mask": ("b o", "mask"),
    "tokens": ("b l", "integers"),
    "token_mask": ("b l", "mask"),
    "actions": ("b t a", "float"),
    "action_mask": ("b t a", "mask"),
    "target_tokens": ("b m", "integers"),
    "target_mask": ("b m", "mask"),
    "embodiment_id": ("b", "integers"),
}
REQUIRED = ("images", "image_mask", "state")
WITH_HISTORY = ("images", "image_mask", "state")  # have an axis `o` after `b` where there is a history
KINDS = {
    "images": "uint8, or floating-point in [-1, 1]",
    "mask": "bool",
    "integers": "int64 or int32",
    "float": "floating-point",
}


@dataclass(kw_only=True)
class Batch:
    """One batch of b samples; a field is None where the samples have no such thing.

    With a history of o observation steps, `images`, `image_mask` and `state` have the axis o after b, the
    newest step last; without one (`history_mask` None) they have no such axis.
    """

    images: Tensor
    """[b, n, 3, h, w], uint8, or float in [-1, 1]."""
    image_mask: Tensor
    """bool [b, n], False where a camera is missing."""
    state: Tensor
    """float [b, s], normalised and padded."""
    history_mask: Tensor | None = None
    """bool [b, o], False where the episode had not begun and its first observation is repeated."""
    tokens: Tensor | None = None
    """int64 or int32 [b, l], the prompt; None for a policy without language."""
    token_mask: Tensor | None = None
    """bool [b, l], False on padding."""
    actions: Tensor | None = None
    """float [b, t, a], normalised and padded; None when acting."""
    action_mask: Tensor | None = None
    """bool [b, t, a], False where the loss does not look (None: it looks everywhere)."""
    target_tokens: Tensor | None = None
    """int64 or int32 [b, m], the tokens that a policy with a token loss should predict."""
    target_mask: Tensor | None = None
    """bool [b, m], False on padding."""
    embodiment_id: Tensor | None = None
    """int64 or int32 [b], for a policy that has weights for each robot."""
    all_real: bool = False
    """True: it is known that no camera is missing and no token is padding, so no mask is needed. `trim` sets
    it, because a GPU would have to wait for what its masks hold."""
    features: Features | None = None
    """Output of frozen modules for images and prompt; the images are then not read, and hold nothing."""
    packing: Packing | None = None
    """Which images and words are real, for a prefix pass that leaves out the others; see `nn.packing`."""

    def __post_init__(self) -> None:
        """Raise CodecError naming the first field that is of another kind or has another number of axes."""
        for name, (axes, kind) in FIELDS.items():
            value = getattr(self, name)
            if value is None and name not in REQUIRED:
                continue
            if not isinstance(value, Tensor):
                raise CodecError(f"batch.{name} must be a tensor, {KINDS[kind]}, not {type(value).__name__}")
            dtype = str(value.dtype).removeprefix("torch.")
            if self.history_mask is not None and name in WITH_HISTORY:
                axes = axes.replace("b", "b o", 1)
            if value.ndim != len(axes.split()):
                raise CodecError(
                    f"batch.{name} has the shape {tuple(value.shape)}; it must have {len(axes.split())} axes,"
                    f" [{axes}]"
                )
            if not _is_kind(value, kind):
                raise CodecError(f"batch.{name} is of dtype {dtype}; it must be {KINDS[kind]}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def present(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        return {name: value for name in FIELDS if (value := getattr(self, name)) is not None}

    def prompt(self) -> tuple[Tensor, Tensor]:
        """Return tokens and token mask. Raises CodecError where the batch has none."""
        if self.tokens is None or self.token_mask is None:
            raise CodecError("the batch has no prompt (tokens and token_mask), and this policy reads one")
        return self.tokens, self.token_mask

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on `device`, its uint8 images turned there into floats in [-1, 1].

        `dtype` (float32 unless given) is that of the images; state and actions stay float32.
        """
        values = self.present()
        images = values.pop("images")
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items()}
        packing = None if self.packing is None else self.packing.to(device)
        if self.features is not None:
            moved |= no_images(images, device)
            return replace(self, **moved, features=self.features.to(device), packing=packing)
        images = unit_images(images.to(device, non_blocking=True), dtype or torch.float32)
        return replace(self, **moved, images=images, packing=packing)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (a DataLoader calls this by name)."""
        return replace(self, **{name: value.pin_memory() for name, value in self.present().items()})

    def trim(self, multiple: int = 16, *, sees_missing: bool = False) -> Batch:
        """Drop cameras that are missing in every row, and token padding beyond a multiple of `multiple`.

        A policy that `sees_missing` cameras (`Needs`) keeps them, and counts their images as real.
        Positions count real tokens only, so the result of a policy does not change. Call it while the batch
        is on the CPU: it looks at the masks. One camera and `multiple` tokens always stay.
        """
        values = self.present()
        seen = self.image_mask.flatten(0, -2).any(0)
        if sees_missing:
            seen[:] = True
        elif not seen.any():
            seen[0] = True
        if not seen.all():
            values |= {"images": self.images[..., seen, :, :, :], "image_mask": self.image_mask[..., seen]}
        for tokens, mask in (("tokens", "token_mask"), ("target_tokens", "target_mask")):
            if mask in values:
                length = _used_length(values[mask], multiple)
                values |= {name: values[name][:, :length] for name in (tokens, mask)}
        masks = (
            ("token_mask", "history_mask") if sees_missing else ("image_mask", "token_mask", "history_mask")
        )
        read = [values[name] for name in masks if name in values]
        return replace(self, **values, all_real=all(bool(mask.all()) for mask in read))

    def packed(self, shape: PrefixShape, kernel: Kernel) -> Batch:
        """Return this trimmed batch, which is on the CPU, with its packing, where that saves enough."""
        kept = self.features is not None and self.features.kind == "prefix"
        if self.all_real or kept or self.history_mask is not None or self.token_mask is None:
            return self
        seen = self.image_mask | shape.sees_missing
        return replace(self, packing=packing_of(seen, self.token_mask, shape, kernel))


def no_images(like: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """Return the field `images` in the shape of `like`, without memory, for a batch with features."""
    return {"images": torch.zeros((), dtype=torch.uint8, device=device).expand(like.shape)}


def _used_length(mask: Tensor, multiple: int) -> int:
    """Return the length [l] that holds every True of `mask` [b, l], rounded up to `multiple`."""
    used = int((mask.any(0) * torch.arange(1, mask.shape[1] + 1)).max())
    return min(-(-max(used, 1) // multiple) * multiple, mask.shape[1])


def _is_kind(value: Tensor, kind: str) -> bool:
    if kind == "mask":
        return value.dtype == torch.bool
    if kind == "integers":
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
    Both may have a history axis after b, which is flattened too.
    """
    if images.is_floating_point():
        images = torch.where(mask[..., None, None, None], images, 0.0)
    return unit_images(images.flatten(0, -4))


def stack(encoded: Sequence[Encoded]) -> Batch:
    """Collate what the codec made of single samples.

    Raises CodecError when there are none, or when a field is there in some samples and None in others.
    """
    if not encoded:
        raise CodecError("no samples to stack: a batch needs at least one")
    joined: dict[str, Any] = {}
    for name in FIELDS:
        values = [value for sample in encoded if (value := getattr(sample, name)) is not None]
        if len(values) not in (0, len(encoded)):
            raise CodecError(
                f"only {len(values)} of {len(encoded)} samples of a batch have {name}: give all or none"
            )
        if values:
            joined[name] = torch.from_numpy(np.stack(values))
    return Batch(**joined)
