"""Forecast a run's memory before anything is loaded, by a training step on the meta device.

Weights, gradients, optimiser states and EMA are counted from the strategy's plan. Activations and workspace
are what tensors hold during forward and backward pass (`live_bytes.py`), with the kernels of the device
(`meta_kernels.py`). The step is that of the stage which trains most, with every camera and the whole prompt.
Not counted: what a device's driver and libraries take, and an allocator's fragmentation; `memory_ladder.py`
leaves room for them. On a CPU that is most of what the resident set has beyond the forecast: glibc keeps
freed blocks, unless MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are small (LOG.md, 2026-11-28).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlafit.nn.batch import Batch
from vlafit.nn.meta_kernels import MetaKernels
from vlafit.nn.policy import Needs, Policy
from vlafit.nn.recompute import Recompute, recompute_blocks
from vlafit.nn.rng import sample_rng
from vlafit.policies import family, family_name
from vlafit.train.adam8bit import States, state_bytes
from vlafit.train.ema import owners
from vlafit.train.frozen import narrow_names
from vlafit.train.live_bytes import LiveBytes
from vlafit.train.piecewise_adamw import workspace
from vlafit.tuning import Plan, Strategy, enter, preview
from vlafit.tuning.adapters import Quantise
from vlafit.tuning.inject import as_new, base_name, compute_adapters_in_bf16, inject, make_groups

QUANTISED_BITS = {"nf4": 4.13, "int8": 8.0}  # with the scales of double quantisation: arXiv 2305.14314


@dataclass(frozen=True)
class Workload:
    """Settings that decide the memory of a training step, beside policy and strategy."""

    rows: int
    """Samples of one process in one optimiser step."""
    micro_batches: int = 1
    draws: int = 1
    cameras: int = 3
    tokens: int = 0
    """Tokens of the prompt; 0: as many as the policy takes."""
    precision: Literal["fp32", "bf16"] = "bf16"
    frozen: Literal["fp32", "bf16"] = "bf16"
    trained: Literal["fp32", "bf16"] = "fp32"
    """How matrices that are trained are kept: `train.weights`."""
    recompute: Recompute = "none"
    states: States = "fp32"
    in_backward: bool = False
    """Whether gradients are freed one by one, as `optim.in_backward` does."""
    ema: bool = False
    processes: int = 1
    shards: int = 1
    """Processes that gradients and optimiser states are sharded over."""
    shards_weights: bool = False
    on_cpu: bool = False
    """Whether a CPU computes, which keeps attention's weights where they have dropout."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process in a training step."""

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    """Bytes that the forward pass keeps for the backward pass, casts of weights included."""
    step: int
    """The most that gradients, activations and workspace take at once; gradients take activations' place.
    Where gradients are freed one by one the optimiser's workspace is part of it."""
    update: int = 0
    """Bytes that the optimiser takes for a moment beside the gradients."""

    @property
    def workspace(self) -> int:
        """Bytes that the step takes for a moment, beside the larger of gradients and activations."""
        return self._most - max(self.gradients, self.activations)

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimiser + self.average + self._most

    @property
    def _most(self) -> int:
        return max(self.step, self.activations, self.gradients + self.update)


def forecast(policy: Policy, strategy: Strategy, workload: Workload) -> Forecast:
    """Return the forecast for a policy on the meta device, which is not changed.

    Raises StrategyError where the strategy does not fit the policy.
    """
    kernels = MetaKernels(
        bf16=workload.precision == "bf16", cached=workload.recompute == "none", on_cpu=workload.on_cpu
    )
    bare, static, quantised = _prepared(policy, strategy, workload, kernels)
    kept, peak = _step(bare, workload, kernels)
    if workload.shards > 1:
        sharded = ([p for p in block.parameters() if p not in quantised] for block in bare.blocks())
        layer = max((sum(map(_bytes, some)) for some in sharded), default=0)
        elsewhere = static.gradients * (workload.shards - 1)  # other processes' shares
        peak = max(kept, peak - elsewhere) + 2 * layer  # one block is gathered while the next is fetched
    return replace(static, activations=kept, step=peak)


def without_step(policy: Policy, strategy: Strategy, workload: Workload) -> Forecast:
    """Return the forecast of all but activations and what a step takes beside them."""
    return _prepared(policy, strategy, workload, MetaKernels(bf16=False, cached=False))[1]


def _prepared(
    policy: Policy, strategy: Strategy, workload: Workload, kernels: MetaKernels
) -> tuple[Policy, Forecast, Mapping[Tensor, Quantise]]:
    """Return a copy of the policy as it is trained, a forecast without a step, and what is quantised how."""
    bare = family(family_name(policy)).build(policy.config, "meta").to("meta")  # its buffers, too
    plan = _largest_stage(preview(bare, strategy))
    prepare(bare, plan, workload, kernels)
    named = {base_name(name): parameter for name, parameter in bare.named_parameters()}
    quantised: dict[Tensor, Quantise] = {
        named[f"{layer}.weight"]: how for layer, how in plan.quantised.items()
    }
    return bare, _static(bare, quantised, workload), quantised


def _largest_stage(plan: Plan) -> Plan:
    stages = [plan.at(number) for number in range(len(plan.strategy.stages))]
    return max(stages, key=lambda stage: stage.trainable_parameters)


def prepare(policy: Policy, plan: Plan, workload: Workload, kernels: MetaKernels) -> None:
    """Apply the plan to a bare policy on the meta device, in the precision of the run."""
    narrow = narrow_names(policy, plan, frozen=workload.frozen == "bf16", trained=workload.trained == "bf16")
    for name in narrow:
        parameter = policy.get_parameter(name)
        parameter.data = parameter.data.to(torch.bfloat16)
    inject(policy, [as_new(group) for group in make_groups(plan.adapted)])
    enter(policy, plan)
    if workload.precision == "bf16":
        compute_adapters_in_bf16(policy)
    for block in policy.blocks():  # the backward pass recomputes outside any mode of the forward pass
        block.forward = partial(_within, kernels, block.forward)
    recompute_blocks(policy, workload.recompute)
    policy.train()


def _within(kernels: MetaKernels, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with kernels:
        return forward(*args, **kwargs)


def _static(policy: Policy, quantised: Mapping[Tensor, Quantise], workload: Workload) -> Forecast:
    weights, whole = sum(map(_bytes, policy.buffers())), 0  # quantised weights are never sharded
    gradients, numbers = [0], [0]
    states = 0
    for parameter in policy.parameters():
        how = quantised.get(parameter)
        if how:
            whole += round(parameter.numel() * QUANTISED_BITS[how] / 8)
        else:
            weights += _bytes(parameter)
        if parameter.requires_grad:
            gradients.append(_bytes(parameter))
            states += state_bytes(parameter, workload.states)
            numbers.append(parameter.numel())
    piecewise = workload.states != "fp32" or workload.trained == "bf16" or workload.in_backward
    shards = workload.shards
    return Forecast(
        weights=whole + (weights // shards if workload.shards_weights else weights),
        gradients=(max(gradients) if workload.in_backward else sum(gradients)) // shards,
        optimiser=states // shards,
        average=4 * _averaged(policy, workload) if workload.ema else 0,
        activations=0,
        step=0,
        update=workspace(max(numbers)) if piecewise else 0,
    )


def _averaged(policy: Policy, workload: Workload) -> int:
    """Return how many numbers the EMA has in the process that keeps most of it."""
    sizes = {name: p.numel() for name, p in policy.named_parameters() if p.requires_grad}
    if workload.shards > 1:
        return sum(sizes.values()) // workload.shards
    held = [0] * workload.processes
    for name, rank in owners(sizes, workload.processes).items():
        held[rank] += sizes[name]
    return max(held)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _step(policy: Policy, workload: Workload, kernels: MetaKernels) -> tuple[int, int]:
    """Return what one forward pass keeps, and the peak with the gradients of all micro-batches."""
    rows = max(1, workload.rows // workload.micro_batches)
    live = LiveBytes([*policy.parameters(), *policy.buffers()])
    kept = 0
    if workload.in_backward:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_stepped)
    with kernels, live:
        for _ in range(min(2, workload.micro_batches)):  # the second has all gradients beside it
            before = live.now
            batch = full_batch(policy.needs(), rows, workload.cameras, workload.tokens).to("meta")
            sums = policy(batch, sample_rng([(0, row) for row in range(rows)], seed=0, draws=workload.draws))
            loss = torch.stack(list(sums.values())).sum()
            kernels.forget()
            kept = max(kept, live.now - before)
            loss.backward()
            del batch, sums, loss
    return kept, live.peak


def _stepped(parameter: nn.Parameter) -> None:
    """Take and free what the optimiser's step of one parameter takes, and its gradient."""
    torch.empty(workspace(parameter.numel()), dtype=torch.uint8, device=parameter.device)
    parameter.grad = None


def full_batch(needs: Needs, rows: int, cameras: int, tokens: int, targets: int = 0) -> Batch:
    """Return a batch on the CPU whose cameras and tokens are all there, and whose numbers are zeros.

    It has at most the cameras that the policy takes; 0 `tokens` or `targets` are as many as it takes.
    """
    cameras = min(cameras, needs.cameras or cameras)
    steps = () if needs.history == 1 else (needs.history,)
    side, shape = needs.image_size, (rows, needs.chunk, needs.action_dim)
    batch = Batch(
        images=torch.zeros(rows, *steps, cameras, 3, side, side, dtype=torch.uint8, device="meta"),
        image_mask=torch.ones(rows, *steps, cameras, dtype=torch.bool, device="meta"),
        state=torch.zeros(rows, *steps, needs.state_dim, device="meta"),
        history_mask=torch.ones(rows, *steps, dtype=torch.bool, device="meta") if steps else None,
        actions=torch.zeros(shape, device="meta"),
        action_mask=torch.ones(shape, dtype=torch.bool, device="meta"),
    )
    if needs.prompt is not None:
        length = tokens or needs.max_tokens
        batch.tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        batch.token_mask = torch.ones(rows, length, dtype=torch.bool, device="meta")
    if (written := needs.action_tokens or needs.action_bins) is not None:
        length = targets or written.longest
        batch.target_tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        batch.target_mask = torch.ones(rows, length, dtype=torch.bool, device="meta")
    return batch
