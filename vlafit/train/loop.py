"""The training loop, on one page: micro-batches, one optimiser step, what happens every N steps.

It knows nothing of files, robots or recipes' names; `run` hands it everything and gives it `events` to call.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlafit.errors import TrainingError
from vlafit.nn.batch import Batch
from vlafit.recipe import OptimRecipe, TrainRecipe
from vlafit.train.draws import noise_and_time
from vlafit.train.optim import Ema, schedule, set_lr
from vlafit.train.parallel import last_backward_only, sum_over_processes

Keys = Sequence[tuple[int, int]]  # (epoch, sample index) of each row


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
    after_step: Callable[[StepResult], None],
) -> None:
    """Run optimiser steps `first_step` .. `recipe.steps`; `batches` yields this process's micro-batches of each.

    The loss of a step is sum(mask * error^2) / sum(mask) over all its micro-batches and processes. A loss or
    gradient that is not finite raises TrainingError before the weights are touched. `wants_stop` on any process
    stops all of them after the step.
    """
    model.train()
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first_step, recipe.steps):
        began = time.perf_counter()
        micro_batches = next(batches)
        loaded = time.perf_counter()
        counts = [
            float(batch.action_mask.sum()) * recipe.draws for _, batch in micro_batches
        ]  # known on the CPU
        agreed = sum_over_processes(
            torch.tensor([sum(counts), float(wants_stop())], dtype=torch.float64, device=device)
        )
        total, stop = float(agreed[0]), bool(agreed[1] > 0)
        if total == 0:
            raise TrainingError(
                f"step {step}: every action of the batch is masked; check the data card's action mask"
            )

        set_lr(optimizer, schedule(step, recipe.steps, optim))
        error_sum = torch.zeros((), dtype=torch.float64, device=device)
        for number, (keys, batch) in enumerate(micro_batches):
            with last_backward_only(model, number == len(micro_batches) - 1):
                out = _loss(model, batch, keys, recipe, device)
                # DDP and FSDP average gradients over processes: `world` undoes that, `total` is the true mean.
                (out["error_sum"] * (world / total)).backward()
            error_sum += out["error_sum"].detach()
        loss = float(sum_over_processes(error_sum)) / total
        norm = _clip(trainable, optim.clip_norm)
        if not (torch.isfinite(norm) and loss == loss and abs(loss) != float("inf")):
            rows = [key for keys, _ in micro_batches for key in keys]
            raise TrainingError(
                f"step {step}: loss {loss} and gradient norm {float(norm)} are not finite; the weights are those of the "
                f"last good step. Lower optim.lr, or look at the samples (epoch, index) {rows[:8]} ..."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()
        lr = optimizer.param_groups[0]["lr"]
        ended = time.perf_counter()
        after_step(StepResult(step + 1, loss, float(norm), lr, ended - began, loaded - began, stop))
        model.train()
        if stop:
            return


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


def _clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradient of all parameters together; return its norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    full = getattr(norm, "full_tensor", None)  # sharded gradients give a sharded norm
    return full() if full is not None else norm
