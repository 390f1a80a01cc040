"""The abstract policy: what training, evaluation and checkpoints know of a model.

A family says how to encode a prefix and how to denoise against it; the flow-matching loss, the velocity and
the sampler are written here once. `loss` is the module's `forward`, since DDP and FSDP act only through
`__call__`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from vlafit.codec.images import Framing
from vlafit.codec.prompts import Prompt
from vlafit.errors import CodecError
from vlafit.nn import flow
from vlafit.nn.batch import Batch
from vlafit.nn.kinds import Kind

if TYPE_CHECKING:
    from vlafit.nn.attached import Attached

Part = str  # a name that the family declares, such as "vision" or "expert"


@dataclass(frozen=True)
class ParameterInfo:
    """Where a parameter sits. `layer` counts from 0 among the part's `layers`, None outside them.

    `dead` parameters are kept for the sake of checkpoints, and feed nothing: they never get a gradient.
    """

    name: str
    part: Part
    kind: Kind
    layer: int | None
    layers: int
    dead: bool = False


@dataclass(frozen=True)
class Needs:
    """What a policy asks of the codec that feeds it."""

    image_size: int
    state_dim: int
    action_dim: int
    chunk: int
    prompt: Prompt
    """How it is asked, unless its checkpoint says otherwise."""
    max_tokens: int
    vocabulary: int
    framing: Framing = "openpi"
    """How images are fitted to `image_size`, unless its checkpoint says otherwise."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that a policy's weights, or those below its adapters, were read from."""

    checkpoint: str
    """A path, or a name that finds it."""
    sha256: str = ""
    """See `vlafit.checkpoints.digest`. Empty: not known, for hashing another program's files takes long."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What had to be said to read it, as `load` takes it."""
    revision: str = ""
    """Which version of it, where it comes from a place that keeps several."""


class Policy(nn.Module, ABC):
    """A flow-matching policy of two passes. `Prefix` below is whatever the family's prefix pass yields."""

    config: Any
    """Frozen dataclass of the family; has at least state_dim, action_dim and chunk."""
    source: Source | None = None
    """Where its weights lie; None where they lie nowhere, as those of a policy that was built or merged."""
    attached: "Attached | None" = None
    """What came with its adapters; see `vlafit.nn.attached`."""

    @abstractmethod
    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once, in the order of `named_parameters`."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the layers that sharding gathers one at a time; each is only used through its own call."""

    @abstractmethod
    def needs(self) -> Needs:
        """Say what a codec for this policy must produce."""

    @abstractmethod
    def encode_prefix(self, batch: Batch, fixed: bool = False) -> Any:
        """Encode images and prompt once. `fixed` asks for the same computation whatever the masks hold."""

    @abstractmethod
    def denoise(self, prefix: Any, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return velocities [b, k, t, a] in float32 for `noisy` [b, k, t, a] at `time` [b, k]."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Raise CodecError naming the first field of `batch` that does not fit the policy."""

    @final
    def forward(self, batch: Batch, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Return the flow-matching loss; see `loss`."""
        velocity, noise = self._velocity(batch, noise, time)  # both [b, k, t, a]
        error = (noise - self._actions(batch)[:, None] - velocity).square()
        mask = batch.action_mask
        if mask is None:
            error_sum, mask_sum = error.sum(), error.new_tensor(float(error.numel()))
        else:
            error_sum = torch.where(mask[:, None], error, 0.0).sum()
            mask_sum = mask.sum(dtype=torch.float32) * error.shape[1]
        return {"loss": error_sum / mask_sum.clamp(min=1.0), "error_sum": error_sum, "mask_sum": mask_sum}

    @final
    def loss(self, batch: Batch, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Return the flow-matching loss of `batch`, which must hold actions.

        `noise` [b, t, a] with `time` [b], or [k, b, t, a] with [k, b]: k draws share one prefix pass, and
        every sum runs over the draws too. Returns float32 scalars: `error_sum`, the sum of mask * error^2;
        `mask_sum`, that of the mask; and `loss`, their quotient (0 when the mask is empty).
        """
        return self(batch, noise, time)

    @final
    def velocity(self, batch: Batch, noise: Tensor, time: Tensor) -> Tensor:
        """Return the velocity at x_t = time * noise + (1 - time) * actions, float32, shaped like `noise`."""
        velocity, _ = self._velocity(batch, noise, time)
        return velocity[:, 0] if noise.ndim == 3 else velocity.transpose(0, 1)

    @final
    @torch.no_grad()
    def act(self, batch: Batch, noise: Tensor, steps: int = 10) -> Tensor:
        """Sample actions [b, t, a] (normalised, padded) from `noise` [b, t, a] by `steps` Euler steps."""
        if steps < 1:
            raise CodecError(f"sampling needs at least 1 step, not {steps}")
        self.check(batch)
        self._check_noise(batch, noise, torch.empty(len(batch)))
        prefix = self.encode_prefix(batch, fixed=True)
        time = noise.new_empty(len(batch), 1, dtype=torch.float32)

        def velocity(x: Tensor, t: float) -> Tensor:
            return self.denoise(prefix, batch.state, x[:, None], time.fill_(t))[:, 0]

        return flow.euler(velocity, noise.float(), steps)

    def _velocity(self, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocity and noise, both [b, k, t, a]."""
        self.check(batch)
        actions = self._actions(batch)
        self._check_noise(batch, noise, time)
        noise = noise[:, None] if noise.ndim == 3 else noise.transpose(0, 1)  # [b, k, t, a]
        time = time[:, None] if time.ndim == 1 else time.transpose(0, 1)  # [b, k]
        noisy = flow.interpolate(actions[:, None], noise, time)
        return self.denoise(self.encode_prefix(batch), batch.state, noisy, time), noise

    def _actions(self, batch: Batch) -> Tensor:
        if batch.actions is None:
            raise CodecError("the batch has no actions: loss and velocity need those of the demonstration")
        if batch.action_mask is None:
            return batch.actions
        # What the loss leaves out is still seen by the other actions, but not if it is no number.
        return torch.where(batch.action_mask | batch.actions.isfinite(), batch.actions, 0.0)

    def _check_noise(self, batch: Batch, noise: Tensor, time: Tensor) -> None:
        want = (len(batch), self.config.chunk, self.config.action_dim)
        if tuple(noise.shape[-3:]) != want or noise.ndim not in (3, 4):
            raise CodecError(f"noise has shape {tuple(noise.shape)}; it must be {want}, or (draws, *{want})")
        if time.shape != noise.shape[:-2]:
            raise CodecError(
                f"time has shape {tuple(time.shape)}; for this noise it must be {tuple(noise.shape[:-2])}"
            )
