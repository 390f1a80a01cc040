"""A batch of random numbers that fits a policy, for measurements and tests."""

import torch

from vlafit.codec.action_bins import BINS
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Needs

CAMERAS = 2
TOKENS = 16  # at most


def random_batch(needs: Needs, rows: int, seed: int = 0) -> Batch:
    """Return `rows` samples with actions on the CPU; every camera, token and step is there."""
    rng = torch.Generator().manual_seed(seed)
    side, shape = needs.image_size, (rows, needs.chunk, needs.action_dim)
    cameras = min(CAMERAS, needs.cameras or CAMERAS)
    seen = (rows,) if needs.history == 1 else (rows, needs.history)
    batch = Batch(
        images=torch.rand(*seen, cameras, 3, side, side, generator=rng) * 2 - 1,
        image_mask=torch.ones(*seen, cameras, dtype=torch.bool),
        state=torch.randn(*seen, needs.state_dim, generator=rng),
        history_mask=None if needs.history == 1 else torch.ones(seen, dtype=torch.bool),
        actions=torch.randn(shape, generator=rng),
        action_mask=torch.ones(shape, dtype=torch.bool),
    )
    if needs.prompt is not None:
        length = min(needs.max_tokens, TOKENS)
        batch.tokens = torch.randint(0, needs.vocabulary, (rows, length), generator=rng)
        batch.token_mask = torch.ones(rows, length, dtype=torch.bool)
    if needs.action_tokens is not None:
        length = min(needs.action_tokens.longest, TOKENS)
        batch.target_tokens = torch.randint(0, needs.vocabulary, (rows, length), generator=rng)
        batch.target_mask = torch.ones(rows, length, dtype=torch.bool)
    if (bins := needs.action_bins) is not None:
        values = needs.chunk * needs.action_dim
        batch.target_tokens = torch.randint(bins.end - BINS, bins.end, (rows, values + 1), generator=rng)
        batch.target_tokens[:, -1] = bins.eos
        batch.target_mask = torch.ones(rows, values + 1, dtype=torch.bool)
    return batch
