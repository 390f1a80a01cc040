"""A regression policy as somebody outside the package would write one: a whole family in one file."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.parameters import build_policy, describe, draw_weights
from vlafit.nn.policy import Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.rng import SampleRng


@dataclass(frozen=True)
class Config:
    image_size: int = 16
    state_dim: int = 4
    action_dim: int = 4
    chunk: int = 4
    width: int = 32


SIZES = {"tiny": Config()}


class Regression(Policy):
    """Pooled image features and the state, through an MLP, to a chunk of actions."""

    scale: Tensor  # [t, 1]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.eye = nn.Conv2d(3, c.width, 4, stride=4)
        self.mlp = nn.Sequential(nn.Linear(c.width + c.state_dim, c.width), nn.ReLU())
        self.head = nn.Linear(c.width, c.chunk * c.action_dim)
        self.register_buffer("scale", torch.linspace(1.0, 0.5, c.chunk)[:, None], persistent=False)

    def parts(self) -> list[ParameterInfo]:
        return describe(self, {"eye": "eye", "mlp": "trunk"}, default="head")

    def needs(self) -> Needs:
        c = self.config
        return Needs(c.image_size, c.state_dim, c.action_dim, c.chunk)

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        self.check(batch)
        error = (self.predict(batch) - required_actions(batch)).square() * rng.draws
        return {"error": (error if batch.action_mask is None else error * batch.action_mask).sum()}

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        self.check(batch)
        return self.predict(batch)

    def predict(self, batch: Batch) -> Tensor:
        seen = F.relu(self.eye(seen_images(batch.images, batch.image_mask))).mean((2, 3))
        pooled = seen.unflatten(0, (len(batch), -1)).mean(1)
        y = self.head(self.mlp(torch.cat((pooled, batch.state), 1)))
        return self.scale * y.unflatten(1, (self.config.chunk, self.config.action_dim)).float()


def build(config: Config, device: str = "meta", generator: torch.Generator | None = None) -> Regression:
    return build_policy(lambda: Regression(config), init_weights, device, generator)


def init_weights(
    policy: Regression, generator: torch.Generator, names: Sequence[str] | None = None
) -> list[str]:
    return draw_weights(policy, generator, names, unit_norms=())
