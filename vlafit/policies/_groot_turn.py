"""The chat turn that GR00T's backbone reads: opening, all images between marks, instruction, closing.

A camera that is missing takes no place, and neither does padding of the instruction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Turn(nn.Module):
    """Where tokens stand in a turn. It has no weights; its constants are buffers."""

    def __init__(
        self, opening: tuple[int, ...], closing: tuple[int, ...], marks: tuple[int, int], pad: int, grid: int
    ) -> None:
        """`marks` come before and after the grid x grid tokens of an image; `pad` is where nothing is."""
        super().__init__()
        self.head, self.tail, self.per_image = len(opening), len(closing), grid * grid + 2
        self.grid = grid
        first, last = torch.tensor([marks[0]]), torch.tensor([marks[1]])
        image = torch.cat((first, torch.full((grid * grid,), pad), last))
        for name, value in (
            ("opening", torch.tensor(opening, dtype=torch.int64)),
            ("closing", torch.tensor(closing, dtype=torch.int64)),
            ("image", image),
            ("offsets", _offsets(grid)),
        ):
            self.register_buffer(name, value, persistent=False)

    opening: Tensor
    closing: Tensor
    image: Tensor
    offsets: Tensor

    def length(self, cameras: int, prompt: int) -> int:
        """Return the number of tokens for so many cameras and tokens of an instruction."""
        return self.head + cameras * self.per_image + prompt + self.tail

    def ids(self, prompt: Tensor, cameras: int) -> Tensor:
        """Return token ids [b, l] for the instruction [b, p]; images' own tokens are padding."""
        b = len(prompt)
        parts = (self.opening.expand(b, -1), self.image.repeat(cameras).expand(b, -1), prompt)
        return torch.cat((*parts, self.closing.expand(b, -1)), 1)

    def mask(self, image_mask: Tensor, prompt_mask: Tensor) -> Tensor:
        """Return which tokens are there, bool [b, l]."""
        head, tail = (prompt_mask.new_ones(len(prompt_mask), n) for n in (self.head, self.tail))
        return torch.cat((head, image_mask.repeat_interleave(self.per_image, 1), prompt_mask, tail), 1)

    def is_image(self, prompt: Tensor, cameras: int) -> Tensor:
        """Return which places are those of images' tokens, bool [l]; their marks are not."""
        inner = torch.ones(self.per_image - 2, dtype=torch.bool, device=prompt.device)
        images = F.pad(inner, (1, 1), value=False).repeat(cameras)
        return F.pad(images, (self.head, prompt.shape[1] + self.tail), value=False)

    def placed(self, tokens: Tensor, cameras: int, length: int) -> Tensor:
        """Put the images' tokens [b*n, grid^2, v] where they stand, [b, l, v]; zeros elsewhere."""
        images = F.pad(tokens, (0, 0, 1, 1)).unflatten(0, (-1, cameras)).flatten(1, 2)
        return F.pad(images, (0, 0, self.head, length - self.head - images.shape[1]))

    def positions(self, image_mask: Tensor, prompt_mask: Tensor) -> Tensor:
        """Return time, row and column [b, l, 3] of each token."""
        step, device = (
            self.grid + 2,
            image_mask.device,
        )  # an image takes as many places as its side has tokens
        start = self.head + step * (image_mask.cumsum(1) - image_mask.long())  # [b, n]
        images = (start[..., None, None] + self.offsets).flatten(1, 2)
        after = self.head + step * image_mask.sum(1, keepdim=True)  # [b, 1]
        prompt = after + prompt_mask.cumsum(1) - 1
        end = after + prompt_mask.sum(1, keepdim=True)
        text = torch.cat((prompt, end + torch.arange(self.tail, device=device)), 1)
        opening = torch.arange(self.head, device=device).expand(len(text), -1)
        return torch.cat((_on_all_axes(opening), images, _on_all_axes(text)), 1)


def _on_all_axes(positions: Tensor) -> Tensor:
    return positions[..., None].expand(-1, -1, 3)


def _offsets(grid: int) -> Tensor:
    """Return time, row and column [grid^2 + 2, 3] of an image's tokens and marks, from its first mark on."""
    places = torch.arange(grid * grid)
    image = 1 + torch.stack((torch.zeros_like(places), places // grid, places % grid), -1)
    first, last = torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), grid + 1)
    return torch.cat((first, image, last))
