"""The one place that knows how several processes share a policy.

DDP gives each process a copy; `full` shards weights, gradients and optimiser states with torch's own
`fully_shard`, on CPU (gloo) and GPU (NCCL) alike, so that what the tests see on two CPU processes is what
runs on eight GPUs. accelerate starts the processes; its own FSDP exists on accelerators only and is not used.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vlafit.nn.policy import Policy
from vlafit.tuning.quantise import quantised_names


def wrap(policy: Policy, how: Literal["none", "full"], device: torch.device) -> nn.Module:
    """Return the module whose call is the loss on several processes: DDP, or the policy sharded in place.

    DDP synchronises what learns now; what learns later it never does, and says nothing: wrap anew then.
    A sharded policy stays as it is (fully_shard asks `requires_grad` whenever it gathers a layer).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return policy
    if how == "full":
        return _shard(policy, device)
    # Quantised weights are frozen, each process rounded the same ones, and not all kinds can be sent.
    rounded = [f"{layer}.weight" for layer in quantised_names(policy)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, rounded)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(policy, device_ids=ids, gradient_as_bucket_view=True)


def _shard(policy: Policy, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in policy.blocks():
        fully_shard(block, mesh=mesh)
    # Left to itself the root stays whole after a forward pass without a backward one, as in validation.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    for method in ("velocity", "act"):  # `loss` is the call itself
        register_fsdp_forward_method(policy, method)
    return policy


@contextmanager
def last_backward_only(model: nn.Module, last: bool) -> Iterator[None]:
    """Synchronise gradients in the last micro-batch of an optimiser step alone."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    sharded = getattr(model, "set_requires_gradient_sync", None)  # fully_shard adds it to the module
    if sharded is not None:
        sharded(last)
    yield


def from_main(value: float, device: torch.device) -> float:
    """Return the main process's `value` on all of them, so that all decide alike; every one must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes; the input itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return possibly sharded tensors whole, on the CPU (where they are whole already: themselves).

    Every process must call it; one that does not `keep` them gets nothing, and needs no memory for them.
    """
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            whole[name] = tensor.cpu()
    return whole


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def scatter_like(whole: Tensor, target: Tensor) -> Tensor:
    """Return `whole` placed and sharded as `target` is."""
    if isinstance(target, DTensor):
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    return whole.to(target.device)
