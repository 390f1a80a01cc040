"""Give a flow policy the first steps of a chunk clean, as training-time real-time chunking does.

"Training-Time Action Conditioning for Efficient Real-Time Chunking" (Black, Ren, Equi and Levine 2025,
arXiv 2512.05964): while a chunk is computed, the robot executes the first `delay` steps of the one before.
Training draws a delay for each chunk, gives that many steps without noise, at flow time 0, and leaves them
out of the loss; sampling gives the steps that are committed in the same way, which costs nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlafit.nn.rng import SampleRng


@dataclass(frozen=True)
class CleanPrefix:
    """Committed actions, normalised [b, t, a], and which steps of a chunk they are: `known`, bool [b, t]."""

    actions: Tensor
    known: Tensor

    def put(self, x: Tensor) -> Tensor:
        """Return `x` [b, t, a] with the committed actions in their places."""
        return torch.where(self.known[..., None], self.actions, x)

    def times(self, time: float) -> Tensor:
        """Return the flow time of every step [b, 1, t]: 0 where the action is known."""
        times = torch.full(self.known.shape, time, dtype=torch.float32, device=self.known.device)
        return torch.where(self.known, 0.0, times)[:, None]


def draw_known(rng: SampleRng, max_delay: int, chunk: int, action_mask: Tensor | None) -> Tensor:
    """Draw which steps of each draw's chunk are given, bool [b, k, t]: the first 0 to `max_delay`, uniformly.

    At least one step that the loss looks at is left. The other random numbers of `rng` stay the same.
    """
    delays = (rng.side().uniform(rng.draws) * (max_delay + 1)).long()  # [b, k]
    steps = torch.arange(chunk)
    if action_mask is None:
        return steps < delays[..., None]
    learned = action_mask.any(-1)  # [b, t]
    last = torch.where(learned, steps.to(learned.device), 0).amax(-1)  # [b]
    delays = torch.minimum(delays.to(last.device), last[:, None])
    return steps.to(last.device) < delays[..., None]
