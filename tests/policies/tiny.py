"""Tiny policies whose every weight is random, and batches for them."""

import torch

from vlafit.nn.batch import Batch
from vlafit.policies import family, family_of
from vlafit.policies.pi0 import SIZES, Pi0Config
from vlafit.policies.smolvla import SIZES as SMOLVLA_SIZES
from vlafit.policies.smolvla import SmolVLAConfig

# How far two correct float32 computations may differ: 8 layers of 4 products round about 4 times
# each, over sums of up to 32 terms, which is 2 * 2^-24 * sqrt(8 * 4 * 4 * 32) = 7.6e-6 of an output of 1
# (tests/rounding.py), and as much of each larger output.
ROUNDINGS = 8 * 4 * 4 * 32
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random_policy(config: Pi0Config | SmolVLAConfig | str, seed: int = 0):
    """Nothing is zero or one here, so that no weight's role stays hidden."""
    made = (SIZES | SMOLVLA_SIZES)[config] if isinstance(config, str) else config
    policy = family(family_of(made)).build(made, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for info in policy.parts():
            parameter = policy.get_parameter(info.name)
            std = 0.3 if parameter.ndim == 1 or ".dense." in info.name else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    return policy


def random_batch(
    config: Pi0Config | SmolVLAConfig, rows: int = 3, cameras: int = 2, length: int = 12, seed: int = 0
) -> Batch:
    """Row 0 lacks the last camera (if there are two), and has the shortest of the padded prompts."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    image_mask = torch.ones(rows, cameras, dtype=torch.bool)
    image_mask[0, 1:] = False
    used = torch.arange(rows) % 3 + length - 4
    return Batch(
        images=torch.randint(0, 256, (rows, cameras, 3, size, size), generator=generator, dtype=torch.uint8),
        image_mask=image_mask,
        tokens=torch.randint(0, config.language.vocab, (rows, length), generator=generator),
        token_mask=torch.arange(length)[None] < used[:, None],
        state=torch.randn(rows, config.state_dim, generator=generator),
        actions=torch.randn(rows, config.chunk, config.action_dim, generator=generator),
    )


def random_draws(
    config: Pi0Config | SmolVLAConfig, rows: int = 3, draws: int = 4, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [k, b, t, a] and time [k, b]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, rows, config.chunk, config.action_dim, generator=generator)
    return noise, torch.rand(draws, rows, generator=generator) * 0.98 + 0.01
