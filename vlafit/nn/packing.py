"""Pack the prefixes of a batch one after the other, so that neither missing cameras nor padding is computed.

A batch of rows with one camera and rows with three, or of short and long prompts, is padded to its longest
row, and every layer of image tower and decoder computes the padding, too. Packed, tokens are [1, T, d], with
their positions, and each sees the tokens of its own row (`Segments`). Results are those of the padded
computation but for rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

log = logging.getLogger(__name__)

Kernel = Literal["rows", "flash", "padded"]
"""How packed tokens attend: row by row; by flash attention over all of them; or padded for attention only."""

SHORT = 64  # tokens: a call of attention for each row would cost more than the padding of such rows
LEAST = 1 / 16  # of a batch's prefix tokens: below it, collecting and spreading tokens costs what it saves
HALF = (torch.bfloat16, torch.float16)
TRIED = (3, 70)  # lengths of the rows by which a kernel is tried


@dataclass(frozen=True)
class PrefixShape:
    """What packing needs to know of a policy's prefix pass."""

    image_tokens: int
    """Tokens of one image."""
    heads: int
    kv_heads: int
    head_dim: int
    sees_missing: bool = False
    """Whether the image of a missing camera is seen like any other."""


@dataclass(frozen=True)
class Segments:
    """The rows that lie one after the other in [1, T, ...]; in place of an attention mask."""

    lengths: tuple[int, ...]
    kernel: Kernel
    slots: Tensor
    """int64 [T]: the place of each token in a batch that is padded to the longest row."""
    bounds: Tensor
    """int32 [rows + 1]: where each row begins, and T."""

    def spread(self, x: Tensor) -> Tensor:
        """Return packed `x` [1, T, ...] row by row [b, longest, ...], 0 beyond a row's end."""
        rows, longest = len(self.lengths), max(self.lengths)
        if rows * longest == x.shape[1]:
            return x[0].unflatten(0, (rows, longest))
        padded = x.new_zeros(rows * longest, *x.shape[2:])
        return padded.index_copy(0, self.slots, x[0]).unflatten(0, (rows, longest))

    def valid(self) -> Tensor | None:
        """Return which places of `spread` are real, bool [b, longest]; None where all are."""
        if len(set(self.lengths)) == 1:
            return None
        lengths = self.bounds.diff()
        return torch.arange(max(self.lengths), device=lengths.device) < lengths[:, None]

    def count(self) -> Tensor:
        """Return the tokens of each row, int64 [b, 1]."""
        return self.bounds.diff()[:, None].long()


@dataclass(frozen=True)
class Packing:
    """Which images and words of a batch are real, and their order row by row."""

    images: Tensor
    """int64 [m], of the b * n images."""
    words: Tensor
    """int64 [w], of the b * l tokens of prompts."""
    order: Tensor
    """int64 [T]: of the tokens of the m images, followed by the w words."""
    positions: Tensor
    """int64 [1, T], counted in each row."""
    segments: Segments
    cameras: tuple[int, ...]
    """Real images of each row."""

    def to(self, device: torch.device | str) -> Packing:
        """Return it with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("images", "words", "order", "positions")
        }
        segments = replace(
            self.segments,
            slots=self.segments.slots.to(device, non_blocking=True),
            bounds=self.segments.bounds.to(device, non_blocking=True),
        )
        return replace(self, **moved, segments=segments)

    def real_images(self, images: Tensor) -> Tensor:
        """Return those of [b, n, ...], one after the other [m, ...]."""
        return images.flatten(0, 1).index_select(0, self.images)

    def real_words(self, tokens: Tensor) -> Tensor:
        """Return those of [b, l], one after the other [w]."""
        return tokens.flatten().index_select(0, self.words)

    def joined(self, images: Tensor, words: Tensor) -> Tensor:
        """Return tokens of images [m, patches, d] and words [w, d] row by row, [1, T, d]."""
        every = torch.cat((images.flatten(0, 1).to(words.dtype), words))
        return every.index_select(0, self.order)[None]


def packing_of(image_mask: Tensor, token_mask: Tensor, shape: PrefixShape, kernel: Kernel) -> Packing | None:
    """Return the packing of a batch by its masks [b, n] and [b, l] on the CPU; None if it saves little.

    `kernel` "rows" is for rows that are long and of several lengths; others are padded for attention.
    """
    tokens = shape.image_tokens
    of_images = image_mask.repeat_interleave(tokens, 1)
    mask = torch.cat((of_images, token_mask), 1)  # [b, l]
    lengths = mask.sum(1)
    if not int(lengths.min()) or not image_mask.any() or int(lengths.sum()) > (1 - LEAST) * mask.numel():
        return None
    images, words = (m.flatten().nonzero()[:, 0] for m in (image_mask, token_mask))
    # Each real token's number among the images' tokens and the words, at its place in the padded batch.
    numbers = torch.cat((of_images.flatten().cumsum(0), token_mask.flatten().cumsum(0))) - 1
    numbers[of_images.numel() :] += len(images) * tokens
    by_row = [part.reshape(len(mask), -1) for part in numbers.split([of_images.numel(), token_mask.numel()])]
    longest = int(lengths.max())
    slots = (torch.arange(longest) < lengths[:, None]).flatten().nonzero()[:, 0]
    sizes = lengths.tolist()
    bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    if kernel == "rows" and (longest < SHORT or len(set(sizes)) == 1):
        kernel = "padded"
    return Packing(
        images,
        words,
        torch.cat(by_row, 1)[mask],
        (mask.cumsum(1) - 1)[mask][None],
        Segments(tuple(sizes), kernel, slots, bounds),
        tuple(image_mask.sum(1).tolist()),
    )


# ------------------------------------------------------------------------------------------- attention


def attend_packed(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: Attend) -> Tensor:
    """Attend from `q` [1, T, h, d] to `k`, `v` [1, T, g, d] within each row; return [1, T, h*d].

    `attend` does it for padded rows, with a mask over keys.
    """
    match segments.kernel:
        case "flash":
            return _flash(q, k, v, segments.bounds, max(segments.lengths))
        case "rows":
            return torch.cat([attend(a, b, c, None) for a, b, c in _rows(q, k, v, segments.lengths)], 1)
    valid = segments.valid()
    mask = None if valid is None else valid[:, None, None]
    out = attend(segments.spread(q), segments.spread(k), segments.spread(v), mask)
    return out.flatten(0, 1).index_select(0, segments.slots)[None]


def _rows(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield queries, keys and values of each row."""
    yield from zip(*(x.split(list(lengths), 1) for x in (q, k, v)), strict=True)


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attend by torch's flash attention over rows of any length."""
    from torch.nn.attention.varlen import varlen_attn

    t, h, d = q.shape[1:]
    g = k.shape[2]
    if g == 1:  # the heads of one key become queries, as in `attend`
        out = varlen_attn(q[0].reshape(t * h, 1, d), k[0], v[0], bounds * h, bounds, longest * h, longest)
    else:
        k, v = (x[0].repeat_interleave(h // g, 1) for x in (k, v))
        out = varlen_attn(q[0], k, v, bounds, bounds, longest, longest)
    assert isinstance(out, Tensor)
    return out.reshape(1, t, h * d)


def kernel_for(device: torch.device, dtype: torch.dtype, shape: PrefixShape) -> Kernel:
    """Return how packed tokens attend on a device: on a GPU by flash attention, if it works there."""
    if device.type != "cuda":
        return "rows"
    return "flash" if dtype in HALF and _flash_works(device, dtype, shape) else "padded"


@cache
def _flash_works(device: torch.device, dtype: torch.dtype, shape: PrefixShape) -> bool:
    """Try flash attention and its gradients on two short rows, against attention of each row."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    size = (1, sum(TRIED))
    try:
        with torch.enable_grad():
            inputs = [
                torch.randn(*size, n, shape.head_dim, device=device, dtype=dtype, generator=generator)
                for n in heads
            ]
            results = []
            for flash in (True, False):
                q, k, v = (x.clone().requires_grad_() for x in inputs)
                if flash:
                    bounds = torch.tensor([0, *accumulate(TRIED)], dtype=torch.int32, device=device)
                    out = _flash(q, k, v, bounds, max(TRIED))
                else:
                    out = torch.cat([_written_out(*row) for row in _rows(q, k, v, TRIED)], 1)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    except (ImportError, RuntimeError, TypeError, AttributeError) as error:
        log.info("flash attention over packed rows does not run here (%s): they are padded for it", error)
        return False
    # Sums of up to 70 terms of half precision: some 1 % of the largest, so 5 % is no rounding.
    worst = max(
        float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)
    )
    if worst > 0.05:
        log.warning("flash attention over packed rows is wrong here (%.0f %%): they are padded", 100 * worst)
    return worst <= 0.05


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in float32 by torch's own attention, without a mask; [1, s, h, d] to [1, s, h*d]."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(times, 2) for x in (k, v))
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)
