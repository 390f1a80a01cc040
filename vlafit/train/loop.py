"""The training loop, on one page: micro-batches, one optimiser step, what happens every N steps.

It knows nothing of files, robots or recipes' names; `run` hands it everything and gives it `events` to call.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlafit.errors import TrainingError
from vlafit.nn.batch import Batch
from vlafit.recipe import OptimRecipe, TrainRecipe
from vlafit.train.draws import noise_and_time
from vlafit.train.optim import Ema, schedule, set_lr
from vlafit.train.parallel import last_backward_only, sum_over_processes

Keys = Sequence[tuple[int, int]]  # (epoch, sample index) of each row


class NotFinite(TrainingError):
    """Weights, loss or gradient left the numbers; nothing of it was saved."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did; all values are of the whole batch over all processes."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    data_seconds: float
    stop: bool
    spent: float = 0.0
    """Share of the time budget that was gone before the step; a step that begins at 1 is the last."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    batches: Iterator[list[tuple[Keys, Batch]]],
    *,
    first_step: int,
    recipe: TrainRecipe,
    optim: OptimRecipe,
    device: torch.device,
    world: int,
    wants_stop: Callable[[], bool],
    spent: Callable[[], float],
    after_step: Callable[[StepResult], None],
) -> None:
    """Run optimiser steps `first_step` .. `recipe.steps`; `batches` yields this process's micro-batches.

    The loss of a step is sum(mask * error^2) / sum(mask) over all its micro-batches and processes. A loss or
    gradient that is not finite raises NotFinite before the weights are touched. `wants_stop` on any process
    stops all of them after the step, and so does `spent`, the share of a time budget, on average of them.
    """
    model.train()
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first_step, recipe.steps):
        began = time.perf_counter()
        micro_batches = next(batches)
        loaded = time.perf_counter()
        total, stop, gone = _agree(micro_batches, recipe.draws, wants_stop(), spent() / world, device)
        if total == 0:
            raise TrainingError(
                f"step {step + 1}: every action of the batch is masked, so there is nothing to learn from"
            )
        set_lr(optimizer, schedule(step, recipe.steps, optim, gone))
        error_sum = torch.zeros((), dtype=torch.float64, device=device)
        for number, (keys, batch) in enumerate(micro_batches):
            with last_backward_only(model, number == len(micro_batches) - 1):
                out = _loss(model, batch, keys, recipe, device)
                # DDP and FSDP average gradients over processes; `world` undoes that.
                (out["error_sum"] * (world / total)).backward()
            error_sum += out["error_sum"].detach()
        loss = float(sum_over_processes(error_sum)) / total
        norm = _clip(trainable, optim.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = [key for keys, _ in micro_batches for key in keys]
            raise NotFinite(
                f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}, not finite; samples "
                f"(epoch, index) {rows[:8]}{' ...' if len(rows) > 8 else ''}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()
        lr = optimizer.param_groups[0]["lr"]
        ended = time.perf_counter()
        after_step(StepResult(step + 1, loss, norm, lr, ended - began, loaded - began, stop, gone))
        model.train()
        if stop or gone >= 1:
            return


def _agree(
    micro_batches: list[tuple[Keys, Batch]], draws: int, stop: bool, spent: float, device: torch.device
) -> tuple[float, bool, float]:
    """Return sums over all processes: the step's action masks, whether any wants to stop, and `spent`."""
    total = 0
    for _, batch in micro_batches:
        assert batch.action_mask is not None  # the codec of a training sample always gives one
        total += int(batch.action_mask.sum()) * draws  # on the CPU: no waiting
    sums = torch.tensor([total, stop, spent], dtype=torch.float64, device=device)
    total, stops, gone = sum_over_processes(sums).tolist()
    return total, stops > 0, gone


def _loss(
    model: nn.Module, batch: Batch, keys: Keys, recipe: TrainRecipe, device: torch.device
) -> dict[str, Tensor]:
    assert batch.actions is not None
    noise, when = noise_and_time(
        keys,
        seed=recipe.seed,
        draws=recipe.draws,
        chunk=batch.actions.shape[1],
        action_dim=batch.actions.shape[2],
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        return model(batch.trim().to(device), noise=noise.to(device), time=when.to(device))


def _clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Clip the gradient of all parameters together; return its norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # sharded gradients, sharded norm
