"""The exponential moving average of the weights, each tensor of it in one process of several.

Where each process has a copy of the policy, all would keep the same averages. So each keeps, and moves, those
of a share of the tensors, and sends them to the others where the policy is validated or saved. The averages
of a sharded policy are sharded as its weights are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlafit.train.distributed import gathered, is_sharded


def owners(
    sizes: Mapping[str, int], processes: int, before: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the process that keeps each average, so that all keep about as much; `before` are kept there."""
    owned = dict(before or {})
    held = [sum(sizes[name] for name in owned if owned[name] == rank) for rank in range(processes)]
    for name in sorted(sizes.keys() - owned.keys(), key=lambda name: (-sizes[name], name)):
        owned[name] = min(range(processes), key=held.__getitem__)
        held[owned[name]] += sizes[name]
    return owned


class Ema:
    """Exponential moving average of the trainable parameters, in fp32.

    After n updates of a parameter the decay is min(decay, (1 + n) / (10 + n)), so that the first steps of
    short runs and of later stages have little weight (the rule of TensorFlow's ExponentialMovingAverage with
    `num_updates`).
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates: dict[str, int] = {}
        """Updates of each parameter since its training began."""
        self.average: dict[str, Tensor] = {}
        """The averages that this process keeps."""
        self._live: dict[str, nn.Parameter] = {}
        self._owners: dict[str, int] = {}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        copies = several and not any(is_sharded(p) for p in policy.parameters() if p.requires_grad)
        self._rank, self._processes = (dist.get_rank(), dist.get_world_size()) if copies else (0, 1)
        self.follow(policy)

    @torch.no_grad()
    def follow(self, policy: nn.Module) -> None:
        """Track the currently trainable parameters; new ones start from their current value.

        A parameter that is no longer trainable is set to its average; `train_state.py` explains why. Every
        process must call it.
        """
        trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        for name, p in self._live.items():
            if name not in trainable:
                if name in self.average:
                    p.copy_(self.average[name])
                self._send(name, p)
        before = {name: rank for name, rank in self._owners.items() if name in trainable}
        sizes = {name: p.numel() for name, p in trainable.items()}
        self._owners = owners(sizes, self._processes, before)
        self.average = {
            name: self.average[name] if name in self.average else p.detach().clone().float()
            for name, p in trainable.items()
            if self._owners[name] == self._rank
        }
        self.updates = {name: self.updates.get(name, 0) for name in trainable}
        self._live = trainable

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        groups: dict[float, list[str]] = {}
        for name in self._live:
            count = self.updates[name] = self.updates[name] + 1
            if name in self.average:
                groups.setdefault(min(self.decay, (1 + count) / (10 + count)), []).append(name)
        for decay, names in groups.items():
            wide = [name for name in names if self._live[name].dtype is torch.float32]
            if wide:  # few launches for all of them
                lives = [self._live[name].detach() for name in wide]
                averages = [self.average[name] for name in wide]
                torch._foreach_lerp_(averages, lives, 1 - decay)  # type: ignore[attr-defined]
            for name in names:
                if self._live[name].dtype is not torch.float32:  # one at a time, because each is copied
                    self.average[name].lerp_(self._live[name].detach().float(), 1 - decay)

    def gathered(self, keep: bool = True) -> dict[str, Tensor]:
        """Return all averages, on the CPU; without `keep` an empty dict. Every process must call it."""
        if self._processes == 1:
            return gathered(self.average, keep)
        whole = {}
        for name, p in self._live.items():
            tensor = self.average.get(name)
            if tensor is None:
                tensor = torch.empty_like(p, dtype=torch.float32)
            self._send(name, tensor)
            if keep:
                whole[name] = tensor.cpu()
        return whole

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the policy's weights are the average; afterwards they are restored.

        Weights in fp32 change places with their average, one tensor at a time, so `average` holds them
        meanwhile; of others there is a copy. Every process must enter and leave it.
        """
        live = {n: self._live[n].detach().clone() for n in self.average if self._is_narrow(n)}
        self._exchange(self.average)
        try:
            yield
        finally:
            self._exchange(live)

    @torch.no_grad()
    def _exchange(self, narrow: Mapping[str, Tensor]) -> None:
        """Exchange fp32 weights with their average, and set the others to those in `narrow`."""
        for name, p in self._live.items():
            if name in self.average and self._is_narrow(name):
                p.copy_(narrow[name])
            elif name in self.average:
                held = p.detach().clone()
                p.copy_(self.average[name])
                self.average[name].copy_(held)
                del held
            self._send(name, p)

    def _is_narrow(self, name: str) -> bool:
        return self._live[name].dtype is not torch.float32

    def _send(self, name: str, tensor: Tensor) -> None:
        """Send a tensor from the process that keeps the average of that name to all others, in place."""
        if self._processes > 1:
            dist.broadcast(tensor.detach(), src=self._owners[name])
