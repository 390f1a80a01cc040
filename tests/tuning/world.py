"""A tiny pi0 whose every tensor matters, one batch for it, and rules that adapt it."""

from collections.abc import Callable

import torch
from torch import Tensor

from vlafit.nn.batch import Batch
from vlafit.policies import pi0

CONFIG = pi0.SIZES["pi0-tiny"]
LINEAR, CONV, ALL = (
    ["attention", "mlp"],
    ["attention", "mlp", "conv"],
    ["attention", "mlp", "conv", "embedding"],
)
METHODS: dict[str, tuple[dict, list[str]]] = {
    "lora": ({"mode": "lora", "rank": 4}, ALL),
    "lora dropout": ({"mode": "lora", "rank": 4, "dropout": 0.1}, LINEAR),
    "rslora": ({"mode": "lora", "rank": 4, "alpha": 8, "rslora": True}, ALL),
    "gaussian": ({"mode": "lora", "rank": 4, "init": "gaussian"}, ALL),
    "pissa": ({"mode": "lora", "rank": 4, "init": "pissa"}, LINEAR),
    "dora": ({"mode": "dora", "rank": 4}, ALL),
    "loha": ({"mode": "loha", "rank": 4}, CONV),
    "lokr": ({"mode": "lokr", "rank": 4}, CONV),
    "adalora": ({"mode": "adalora", "rank": 4, "target_rank": 2}, CONV),
    "oft": ({"mode": "oft", "block": 8}, LINEAR),
    "ia3": ({"mode": "ia3"}, CONV),
    "miss": ({"mode": "miss", "rank": 4}, LINEAR),
}
QUANTISED: dict[str, tuple[dict, list[str]]] = {
    "nf4": ({"mode": "lora", "rank": 4, "quantise": "nf4"}, LINEAR),
    "int8": ({"mode": "lora", "rank": 4, "quantise": "int8"}, LINEAR),
}


def rules(name: str) -> list[dict]:
    """Adapt by the method all that it can adapt, train the projections in full, freeze the rest."""
    rule, kinds = {**METHODS, **QUANTISED}[name]
    return [
        {"select": {"part": "projections"}, "mode": "full"},
        {"select": {"kind": kinds}, **rule},
        {"mode": "frozen"},
    ]


def make_policy() -> pi0.Pi0:
    """A tiny pi0 in which nothing is zero, so that no tensor is without effect."""
    rng = torch.Generator().manual_seed(1)
    policy = pi0.build(CONFIG, "cpu", rng)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return policy


def make_batch(rows: int = 2) -> tuple[Batch, Tensor, Tensor]:
    """Batch, noise and time."""
    rng, c = torch.Generator().manual_seed(2), CONFIG
    pixels = c.vision.image_size
    return (
        Batch(
            images=torch.rand(rows, 2, 3, pixels, pixels, generator=rng) * 2 - 1,
            image_mask=torch.ones(rows, 2, dtype=torch.bool),
            tokens=torch.randint(0, c.language.vocab, (rows, c.max_tokens), generator=rng),
            token_mask=torch.ones(rows, c.max_tokens, dtype=torch.bool),
            state=torch.randn(rows, c.state_dim, generator=rng),
            actions=torch.randn(rows, c.chunk, c.action_dim, generator=rng),
            action_mask=torch.ones(rows, c.chunk, c.action_dim, dtype=torch.bool),
        ),
        torch.randn(rows, c.chunk, c.action_dim, generator=rng),
        torch.rand(rows, generator=rng),
    )


def velocity(policy: pi0.Pi0) -> Tensor:
    """What the policy answers to the batch, in evaluation mode."""
    policy.eval()
    with torch.no_grad():
        return policy.velocity(*make_batch())


def probe(policy: pi0.Pi0) -> Callable[[], Tensor]:
    return lambda: velocity(policy)


def train(policy: pi0.Pi0, steps: int = 4, lr: float = 1e-2) -> list[float]:
    """Train what is trainable for some steps, and return the losses."""
    policy.train()
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    batch, noise, time = make_batch()
    losses = []
    for _ in range(steps):
        loss = policy.flow_loss(batch, noise, time)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
