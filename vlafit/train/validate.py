"""Validation on held-out episodes, with noise and time fixed once for the whole run.

The same samples and draws at every step make two validation losses of one run, or of two runs, comparable.
"""

from collections.abc import Sequence

import torch

from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.recipe import TrainRecipe
from vlafit.train.distributed import sum_over_processes
from vlafit.train.loop import Keys
from vlafit.train.noise import VALIDATION, noise_and_time


@torch.no_grad()
def validate(
    policy: Policy,
    batches: Sequence[tuple[Keys, Batch]],
    recipe: TrainRecipe,
    device: torch.device,
    name: str = "",
) -> dict[str, float]:
    """Return `validation/loss` and `validation/action_error` over all processes' batches.

    Of a named validation set these are `validation/NAME/loss` and `validation/NAME/action_error`.

    The action error is the mean absolute difference, in normalised units over real steps and dimensions,
    between the demonstrated chunk and the one sampled from fixed noise.
    """
    policy.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for keys, batch in batches:
        assert batch.actions is not None and batch.action_mask is not None
        noise, when = noise_and_time(
            keys,
            seed=0,  # not the recipe's: runs of different seeds are compared
            draws=1,
            chunk=batch.actions.shape[1],
            action_dim=batch.actions.shape[2],
            stream=VALIDATION,
        )
        batch, noise, when = batch.trim().to(device), noise.to(device), when.to(device)
        assert batch.actions is not None and batch.action_mask is not None
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            out = policy(batch, noise=noise, time=when)
            sampled = policy.act(batch, noise=noise[0], steps=10)
        error = ((sampled.float() - batch.actions).abs() * batch.action_mask).sum()
        sums += torch.stack([out["error_sum"], out["mask_sum"], error, batch.action_mask.sum()]).double()
    policy.train()
    sums = sum_over_processes(sums).tolist()
    if sums[1] == 0:
        return {}
    prefix = f"validation/{name}/" if name else "validation/"
    return {f"{prefix}loss": sums[0] / sums[1], f"{prefix}action_error": sums[2] / sums[3]}
