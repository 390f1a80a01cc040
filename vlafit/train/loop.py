"""The training loop, on one page: micro-batches, one optimiser step, what happens every N steps.

It knows nothing of files, robots or recipes' names: the caller passes everything in and is called back after
every step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlafit.errors import TrainingError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy, mean_loss
from vlafit.nn.rng import Keys, SampleRng, dropout_seed, sample_rng
from vlafit.recipe import OptimRecipe, TrainRecipe
from vlafit.train.batch_shape import BatchShape
from vlafit.train.clipping import clip
from vlafit.train.distributed import last_backward_only, sum_over_processes
from vlafit.train.optim import begin_step, rewarm, schedule
from vlafit.train.train_state import TrainState


class NotFinite(TrainingError):
    """Weights, loss or gradient are not finite; nothing of it was saved."""


@dataclass(frozen=True)
class StepResult:
    """Results of one optimiser step; all values are of the whole batch over all processes."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    """Of rules without a factor of their own."""
    seconds: float
    data_seconds: float
    stop: bool
    spent: float = 0.0
    """Share of the time budget that was gone before the step; a step that begins at 1 is the last."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Mean of each term of the loss; empty where the loss has only one."""
    tokens: float = 0.0
    """Tokens that the policy computed, padding included; 0 where its family counts none."""
    shapes: tuple[BatchShape, ...] = ()
    """Of this process's micro-batches, as they went into the policy; packed ones count by rows."""


def train(
    state: TrainState,
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

    `batches` yields this process's micro-batches. Each term of a step's loss is its sum over all
    micro-batches and processes, divided by its count over all of them (see `Policy.loss`). A loss or gradient
    that is not finite raises NotFinite before the weights are touched, or before anything of the step is
    saved where steps are in the backward pass. `wants_stop` on any process stops all
    of them after the step, and so does `spent`, the share of a time budget, on average of them.
    """
    model, optimizer, ranks, device = state.model, state.optimizer, state.ranks, state.device
    trainable, began_at, terms = state.trainable, state.place.began, state.policy.terms()
    model.train()
    for step in range(first_step, recipe.steps):
        began = time.perf_counter()
        micro_batches = next(batches)
        loaded = time.perf_counter()
        micro_batches = [(keys, state.prepare(keys, batch)) for keys, batch in micro_batches]
        rngs = [sample_rng(keys, seed=recipe.seed, draws=recipe.draws) for keys, _ in micro_batches]
        counts, is_whole, tokens, stop, gone = _agree(
            state.policy, micro_batches, rngs, wants_stop(), spent() / world, device
        )
        if not any(counts.values()):
            raise TrainingError(
                f"step {step + 1}: every action of the batch is masked, so there is nothing to learn from"
            )
        warm = rewarm(step - began_at, state.warmup_steps)
        factor = warm * schedule(step, recipe.steps, optim, gone)
        begin_step(optimizer, step, factor)
        sums = _backward(state, micro_batches, rngs, counts, recipe, step, world)
        totals = dict(zip(terms, sum_over_processes(sums).tolist(), strict=True))
        loss = mean_loss(terms, totals, counts)
        stepped = None if state.in_backward is None else state.in_backward.finish()
        norm = clip(trainable, optim.clip_norm) if stepped is None else stepped.norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = [key for keys, _ in micro_batches for key in keys]
            raise NotFinite(
                f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}, not finite; samples "
                f"(epoch, index) {rows[:8]}{' ...' if len(rows) > 8 else ''}"
                f"{'' if stepped is None else stepped.fault}"
            )
        state.check.look(step - began_at + 1, is_whole)
        optimizer.step()
        if ranks is not None:
            ranks.after_step(step + 1, gone)
        optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update()
            if ranks is not None:
                ranks.prune(state.ema.average)
        lr = optim.lr * factor
        ended = time.perf_counter()
        means = {name: totals[name] / counts[name] for name in terms if counts[name] and len(terms) > 1}
        shapes = tuple(part for _, batch in micro_batches for part in BatchShape.parts_of(batch))
        result = StepResult(
            step + 1, loss, norm, lr, ended - began, loaded - began, stop, gone, means, tokens, shapes
        )
        goes_on = after_step(result)
        model.train()
        if stop or gone >= 1 or not goes_on:
            return


def _backward(
    state: TrainState,
    micro_batches: Sequence[tuple[Keys, Batch]],
    rngs: Sequence[SampleRng],
    counts: Mapping[str, float],
    recipe: TrainRecipe,
    step: int,
    world: int,
) -> torch.Tensor:
    """Add up the gradients of trimmed micro-batches; return this process's sum of each term, [terms]."""
    model, device, terms = state.model, state.device, state.policy.terms()
    sums = torch.zeros(len(terms), dtype=torch.float64, device=device)
    for number, ((keys, batch), rng) in enumerate(zip(micro_batches, rngs, strict=True)):
        last = number == len(micro_batches) - 1
        torch.manual_seed(dropout_seed(keys, seed=recipe.seed, step=step))
        with last_backward_only(model, last):
            out = _loss(model, batch, rng, recipe, device)
            share_of_loss = _share(terms, out, counts, world)
            if state.ranks is not None and last:
                share_of_loss = share_of_loss + state.ranks.penalty()  # the same on all processes
            share_of_loss.backward()
        sums += torch.stack([out[name].detach() for name in terms])
    return sums


def _agree(
    policy: Policy,
    micro_batches: Sequence[tuple[Keys, Batch]],
    rngs: Sequence[SampleRng],
    stop: bool,
    spent: float,
    device: torch.device,
) -> tuple[dict[str, float], bool, float, bool, float]:
    """Return over all processes: the step's count of each term, whether each has one and an action counts,
    its tokens, whether any wants to stop, and `spent`.
    """
    names = list(policy.terms())
    drawn = [(batch, rng) for (_, batch), rng in zip(micro_batches, rngs, strict=True)]
    counted = [policy.drawn_counts(batch, rng) for batch, rng in drawn]  # on the CPU: no waiting
    own = [sum(counts[name] for counts in counted) for name in names]
    tokens = sum(policy.tokens(batch, rng.draws) for batch, rng in drawn)
    acts = any(batch.action_mask is None or bool(batch.action_mask.any()) for _, batch in micro_batches)
    sums = torch.tensor([*own, acts, tokens, stop, spent], dtype=torch.float64, device=device)
    *totals, acting, tokens, stops, gone = sum_over_processes(sums).tolist()
    is_whole = acting > 0 and all(
        total or not policy.terms()[n] for n, total in zip(names, totals, strict=True)
    )
    return dict(zip(names, totals, strict=True)), is_whole, tokens, stops > 0, gone


def _share(
    terms: Mapping[str, float], sums: Mapping[str, Tensor], counts: Mapping[str, float], world: int
) -> Tensor:
    """Return a micro-batch's share of the step's loss."""
    # DDP and FSDP average gradients over processes; `world` undoes that.
    shares = [
        sums[name] * (factor * (world / counts[name]) if counts[name] else 0.0)
        for name, factor in terms.items()
    ]
    return sum(shares[1:], shares[0])


def _loss(
    model: nn.Module, batch: Batch, rng: SampleRng, recipe: TrainRecipe, device: torch.device
) -> dict[str, Tensor]:
    # Kept casts of weights would be memory that recompute is to save; each weight is read once anyway.
    keep_casts = recipe.recompute not in ("selective", "full")
    bf16 = recipe.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=keep_casts):
        return model(batch.to(device), rng)
