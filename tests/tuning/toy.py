"""A policy of five tiny parts: enough for every rule, small enough to count by hand."""

import torch
from torch import nn

from vlafit.nn.policy import ParameterInfo as Info


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(torch.relu(self.attention(self.norm(x))))


class ToyPolicy(nn.Module):
    """Vision (a convolution), projector, language (embedding and 3 layers, the last MLP dead), expert (4)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.vision = nn.Conv2d(3, width, 2)
        self.projector = nn.Linear(width, width)
        self.embed = nn.Embedding(7, width)
        self.language = nn.ModuleList(Block(width) for _ in range(3))
        self.expert = nn.ModuleList(Block(width) for _ in range(4))
        self.actions = nn.Linear(width, 2)

    def parts(self) -> list[Info]:
        found = []
        for name, _ in self.named_parameters():
            words = name.split(".")
            match words[0]:
                case "vision":
                    found.append(Info(name, "vision", "conv", None, 0))
                case "projector":
                    found.append(Info(name, "projector", "linear", None, 0))
                case "embed":
                    found.append(Info(name, "language", "embedding", None, 3))
                case "language":
                    found.append(
                        Info(name, "language", words[2], int(words[1]), 3, name.startswith("language.2.mlp"))
                    )
                case "expert":
                    found.append(Info(name, "expert", words[2], int(words[1]), 4))
                case "actions":
                    found.append(Info(name, "projections", "linear", None, 0))
        return found

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        x = self.projector(self.vision(image).mean((2, 3))) + self.embed(word)
        for index, block in enumerate(self.language):
            x = block(x) if index < 2 else x + block.attention(block.norm(x))
        for block in self.expert:
            x = block(x)
        return self.actions(x)


def step(policy: ToyPolicy, optimiser: torch.optim.Optimizer, seed: int = 0) -> None:
    """Take one optimiser step on made-up data."""
    rng = torch.Generator().manual_seed(seed)
    image, word = torch.randn(5, 3, 2, 2, generator=rng), torch.randint(0, 7, (5,), generator=rng)
    optimiser.zero_grad()
    policy(image, word).square().sum().backward()
    optimiser.step()
