"""Distributed training: DDP, FSDP2, and the collectives that the rest of `train` uses.

DDP gives each process a copy; `full` shards weights, gradients and optimiser states with torch's
`fully_shard`, and `gradients` does the same but keeps the weights gathered from the forward to the backward
pass; with `train.replicas`, each of several copies is sharded over a part of the processes. Quantised weights
are frozen, small and equal on all processes: each keeps them whole. All run on CPU (gloo) and GPU (NCCL)
alike, so tests on CPU processes run the same code as eight GPUs. accelerate starts the processes; its own
FSDP only supports accelerators and is not used.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlafit.checkpoints import stored_as
from vlafit.nn.policy import Policy
from vlafit.recipe import TrainRecipe
from vlafit.tuning.inject import adapted_layers
from vlafit.tuning.quantise import quantised_names

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def wrap(policy: Policy, train: TrainRecipe, device: torch.device) -> nn.Module:
    """Return the module whose call computes the loss: DDP, the policy sharded in place, or the policy.

    DDP only synchronises what is trainable when it is created, so the policy must be wrapped again when that
    changes. A sharded policy need not be (`fully_shard` reads `requires_grad` whenever it gathers a layer).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return policy
    if train.shards:
        return _shard(policy, device, train)
    # Quantised weights are frozen and equal on all processes, and not all kinds can be broadcast.
    quantised = [f"{layer}.weight" for layer in quantised_names(policy)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, quantised)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(policy, device_ids=ids, gradient_as_bucket_view=True)


def _shard(policy: Policy, device: torch.device, train: TrainRecipe) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    replicas = train.replicas or 1
    sizes, names = (dist.get_world_size() // replicas,), ("shards",)
    if replicas > 1:
        sizes, names = (replicas, *sizes), ("replicas", *names)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    quantised = {policy.get_parameter(f"{layer}.weight") for layer in quantised_names(policy)}
    shard = partial(
        fully_shard, mesh=mesh, reshard_after_forward=train.sharding == "full", ignored_params=quantised
    )
    # bf16 products read weights so: gathering them in float32 would take twice the traffic and memory.
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block, apart in blocks_to_shard(policy, in_bf16=train.precision == "bf16"):
        if apart:  # as one group, which is gathered at once
            shard(apart)
        shard(block, mp_policy=MixedPrecisionPolicy() if apart is None else narrow)
    # By default the root stays gathered after a forward pass without a backward pass, as in validation.
    shard(policy)
    for method in ("act", "measures") if policy.measured() else ("act",):  # `loss` is the call itself
        register_fsdp_forward_method(policy, method)
    return policy


def blocks_to_shard(policy: Policy, *, in_bf16: bool) -> Iterator[tuple[nn.Module, list[nn.Module] | None]]:
    """Yield each block, and those of its modules that must be gathered in float32 where the rest is in bf16.

    None: all of it as it is. So are blocks with adapters: DoRA, for one, reads weights outside the call of
    the module that holds them, before which they are gathered. What is frozen below is kept in bf16 anyway.
    """
    precise = {info.name for info in policy.parts() if stored_as(info, torch.bfloat16) is not torch.bfloat16}
    adapted = {module for _, module in adapted_layers(policy)}
    held = {
        module: any(name in precise for name, _ in module.named_parameters(path, recurse=False))
        for path, module in policy.named_modules()
    }
    for block in policy.blocks():
        if not in_bf16 or held[block] or any(module in adapted for module in block.modules()):
            yield block, None
        else:
            yield block, [module for module in block.modules() if held[module]]


@contextmanager
def gathered_anew(policy: nn.Module, how: str) -> Iterator[None]:
    """Within this block each forward pass gathers sharded weights anew, as validation needs.

    Without a backward pass weights that stay gathered would be those of the average in the next step, too.
    """
    set_reshard = getattr(policy, "set_reshard_after_forward", None)  # fully_shard adds it to the module
    if how != "gradients" or set_reshard is None:
        yield
        return
    set_reshard(True)
    try:
        yield
    finally:
        set_reshard(False)


@contextmanager
def last_backward_only(model: nn.Module, last: bool) -> Iterator[None]:
    """Synchronise gradients only in the last micro-batch of an optimiser step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    set_sync = getattr(model, "set_requires_gradient_sync", None)  # fully_shard adds it to the module
    if set_sync is not None:
        set_sync(last)
    yield


def from_main(value: float, device: torch.device) -> float:
    """Broadcast the main process's `value`, so that all decide alike; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes, in place; with one process, `values` itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether the tensor is sharded over processes."""
    tensors = sys.modules.get("torch.distributed.tensor")  # importing it takes a second, and `_shard` does
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return possibly sharded tensors gathered, on the CPU.

    Every process must call it; those without `keep` get an empty dict and need no memory for the tensors.
    """
    whole = {}
    for name, tensor in tensors.items():
        tensor = full(tensor.detach())
        if keep:
            whole[name] = tensor.cpu()
    return whole


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def scatter_like(whole: Tensor, target: Tensor) -> Tensor:
    """Return `whole` on the device, and with the sharding, of `target`."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    return whole.to(target.device)
