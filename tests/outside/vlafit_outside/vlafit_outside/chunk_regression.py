"""A policy family: a small network that predicts the whole chunk at once, without language or sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.parameters import build_policy, describe, draw_weights
from vlafit.nn.policy import Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.rng import SampleRng


@dataclass(frozen=True)
class Config:
    """The sizes of a policy."""

    image_size: int = 32
    """Pixels of the square image."""
    width: int = 64
    """Width of the hidden layer."""
    state_dim: int = 8
    """Dimensions of the state, padded."""
    action_dim: int = 8
    """Dimensions of an action, padded."""
    chunk: int = 8
    """Actions predicted at once."""


SIZES = {"small": Config(), "tiny": Config(image_size=8, width=16, state_dim=4, action_dim=3, chunk=4)}


class ChunkRegression(Policy):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, kernel_size=4, stride=4)
        self.mlp = nn.Linear(config.width + config.state_dim, config.width)
        self.out = nn.Linear(config.width, config.chunk * config.action_dim)

    def parts(self) -> list[ParameterInfo]:
        return describe(self, {"patches": "eyes"}, default="head")

    def needs(self) -> Needs:
        c = self.config
        return Needs(c.image_size, c.state_dim, c.action_dim, c.chunk)

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        error = (self._predict(batch) - required_actions(batch)).abs().float()
        if batch.action_mask is not None:
            error = error * batch.action_mask
        return {"error": error.sum() * rng.draws}

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        return self._predict(batch)

    def _predict(self, batch: Batch) -> Tensor:
        b, n = batch.image_mask.shape
        images = seen_images(batch.images, batch.image_mask)  # [b*n, 3, h, w]
        seen = self.patches(images.to(self.patches.weight.dtype)).mean((-2, -1)).view(b, n, -1)
        mask = batch.image_mask[..., None].to(seen.dtype)  # a missing camera counts nothing
        seen = (seen * mask).sum(1) / mask.sum(1).clamp(min=1)
        hidden = torch.relu(self.mlp(torch.cat([seen, batch.state.to(seen.dtype)], -1)))
        return self.out(hidden).view(b, self.config.chunk, self.config.action_dim)


def build(config: Config, device: str = "cpu", generator: torch.Generator | None = None) -> ChunkRegression:
    return build_policy(lambda: ChunkRegression(config), init_weights, device, generator)


def init_weights(
    policy: ChunkRegression, generator: torch.Generator, names: Sequence[str] | None = None
) -> list[str]:
    return draw_weights(policy, generator, names, unit_norms=())
