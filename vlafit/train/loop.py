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
from vlafit.train.distributed import last_backward_only, sum_over_processes
from vlafit.train.noise import dropout_seed, noise_and_time
from vlafit.train.optim import rewarm, schedule, set_lr
from vlafit.train.train_state import TrainState

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
    learner: TrainState,
    batches: Iterator[list[tuple[Keys, Batch]]],
    *,
    first_step: int,
    recipe: TrainRecipe,
    optim: OptimRecipe,
    world: int,
    wants_stop: Callable[[], bool],
    spent: Callable[[], float],
    after_step: Callable[[StepResult], bool],
) -> None:
    """Run optimiser steps from `first_step` on to `recipe.steps`, or until `after_step` returns False.

    `batches` yields this process's micro-batches. The loss of a step is sum(mask * error^2) / sum(mask) over
    all its micro-batches and processes. A loss or gradient that is not finite raises NotFinite before the
    weights are touched. `wants_stop` on any process stops all of them after the step, and so does `spent`,
    the share of a time budget, on average of them.
    """
    model, optimizer, ranks, device = learner.model, learner.optimizer, learner.ranks, learner.device
    trainable, began_at = learner.trainable, learner.place.began
    model.train()
    for step in range(first_step, recipe.steps):
        began = time.perf_counter()
        micro_batches = next(batches)
        loaded = time.perf_counter()
        total, stop, gone = _agree(micro_batches, recipe.draws, wants_stop(), spent() / world, device)
        if total == 0:
            raise TrainingError(
                f"step {step + 1}: every action of the batch is masked, so there is nothing to learn from"
            )
        warm = rewarm(step - began_at, learner.warmup_steps)
        set_lr(optimizer, warm * schedule(step, recipe.steps, optim, gone))
        error_sum = torch.zeros((), dtype=torch.float64, device=device)
        for number, (keys, batch) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            torch.manual_seed(dropout_seed(keys, seed=recipe.seed, step=step))
            with last_backward_only(model, last):
                out = _loss(model, batch, keys, recipe, device)
                # DDP and FSDP average gradients over processes; `world` undoes that.
                share_of_loss = out["error_sum"] * (world / total)
                if ranks is not None and last:
                    share_of_loss = share_of_loss + ranks.penalty()  # the same on all processes
                share_of_loss.backward()
            error_sum += out["error_sum"].detach()
        loss = float(sum_over_processes(error_sum)) / total
        norm = _clip(trainable, optim.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = [key for keys, _ in micro_batches for key in keys]
            raise NotFinite(
                f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}, not finite; samples "
                f"(epoch, index) {rows[:8]}{' ...' if len(rows) > 8 else ''}"
            )
        learner.check.look(step - began_at + 1)
        optimizer.step()
        if ranks is not None:
            ranks.after_step(step + 1, gone)
        optimizer.zero_grad(set_to_none=True)
        if learner.ema is not None:
            learner.ema.update()
            if ranks is not None:
                ranks.prune(learner.ema.average)
        lr = optimizer.param_groups[0]["lr"]
        ended = time.perf_counter()
        result = StepResult(step + 1, loss, norm, lr, ended - began, loaded - began, stop, gone)
        goes_on = after_step(result)
        model.train()
        if stop or gone >= 1 or not goes_on:
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
