"""A local policy as an Actor: observations in, chunks in the robot's units out, through the codec both ways.

What it returns for an observation depends on that observation, its key and the seed alone: not on what else
is in the batch, nor on how much. So every batch has one width (a row is repeated to fill it), one set of
camera slots and one prompt length (the codec's), and each row's noise is drawn from its own key.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vlafit import checkpoints
from vlafit.codec.codec import Codec
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import Batch, stack
from vlafit.nn.policy import Policy
from vlafit.types import ActionChunk, Embodiment, EpisodeKey, Observation


def noise_for(key: EpisodeKey, seed: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the standard normal noise [t, a] that belongs to `key`, the same in every process."""
    task = int.from_bytes(hashlib.sha256(key.task.encode()).digest()[:8], "big")
    source = np.random.SeedSequence([seed, task, key.seed, key.replan])
    return np.random.Generator(np.random.Philox(source)).standard_normal(shape, dtype=np.float32)


class PolicyActor:
    """Acts with `policy` through `codec`: `steps` Euler steps, `width` rows a batch, noise from `seed`.

    `identity` names the weights (a checkpoint's hash, say); without it `fingerprint` hashes them. `seeds` are
    the recorded ones, by task, that the policy has learned from.
    """

    def __init__(
        self,
        policy: Policy,
        codec: Codec,
        *,
        steps: int = 10,
        width: int = 16,
        seed: int = 0,
        identity: str = "",
        seeds: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        for name, value, least in (("steps", steps, 1), ("width", width, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"a policy actor's {name} must be at least {least}, not {value}")
        self.policy = policy
        self.codec = codec
        self.steps = steps
        self.width = width
        self.seed = seed
        self.seeds = seeds or {}
        self._identity = identity
        # Slots that no camera of this robot fills are missing in every observation; a policy may drop those.
        slots = [i for i, name in enumerate(codec.config.cameras) if name]
        self._slots = slots or [0]

    @property
    def embodiment(self) -> Embodiment:
        """The robot that the policy was trained on."""
        return self.codec.embodiment

    def fingerprint(self) -> str:
        """Return what decides the actions: the weights (or the identity given), sampling and device."""
        identity = self._identity
        if not identity:
            found = hashlib.sha256()
            for name, value in sorted(self.policy.state_dict().items()):
                found.update(name.encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            identity = f"sha256:{found.hexdigest()}"
        device = next(self.policy.parameters()).device
        made = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{identity} steps={self.steps} width={self.width} seed={self.seed} device={made}"

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one chunk [t, a] for each observation, in order.

        Raises CodecError for observations that are not of the policy's embodiment.
        """
        if len(observations) != len(keys):
            raise CodecError(f"{len(observations)} observations with {len(keys)} keys: each needs its own")
        chunks: list[ActionChunk] = []
        with _evaluating(self.policy):
            for begin in range(0, len(keys), self.width):
                end = begin + self.width
                chunks += self._batch(observations[begin:end], keys[begin:end])
        return chunks

    @torch.no_grad()
    def _batch(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        encoded = [self.codec.encode(observation) for observation in observations]
        shape = (self.codec.config.chunk, self.codec.config.action_dim)
        noise = [noise_for(key, self.seed, shape) for key in keys]
        missing = self.width - len(keys)
        device = next(self.policy.parameters()).device
        batch = self._cut(stack(encoded + encoded[:1] * missing)).to(device)
        rows = torch.from_numpy(np.stack(noise + noise[:1] * missing)).to(device)  # [width, t, a]
        actions = self.policy.act(batch, noise=rows, steps=self.steps).float().cpu().numpy()
        return [
            self.codec.decode(row, observation)
            for row, observation in zip(actions[: len(keys)], observations, strict=True)
        ]

    def _cut(self, batch: Batch) -> Batch:
        """Drop the camera slots that are always missing; nothing here looks at what the rows hold."""
        return dataclasses.replace(
            batch, images=batch.images[:, self._slots], image_mask=batch.image_mask[:, self._slots]
        )


def load_actor(
    path: str | Path, *, steps: int = 10, width: int = 16, seed: int = 0, device: str = ""
) -> PolicyActor:
    """Load a checkpoint (a folder, the name of one that ships, or an id of the Hub) as an actor.

    `device` is torch's name; the GPU if there is one when empty. Raises what `checkpoints.load` raises, and
    ConfigError where the checkpoint has no codec or the device is not there.
    """
    folder = checkpoints.place(path).path
    loaded = checkpoints.load(
        folder, device=_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    )
    if loaded.codec is None:
        raise ConfigError(
            f"{folder}: a {loaded.report.form} checkpoint has no codec, which says what its numbers mean "
            "to a robot; fine-tune it first, and evaluate what that saves"
        )
    return PolicyActor(
        loaded.policy,
        loaded.codec,
        steps=steps,
        width=width,
        seed=seed,
        identity=f"checkpoint sha256:{checkpoints.digest(folder)}",
        seeds=checkpoints.read_lineage(folder).seeds,
    )


def _device(name: str) -> torch.device:
    """Return torch's device of this name, or raise ConfigError where no numbers can be put and got back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); take cpu, or cuda on a GPU"
        ) from error
    return device


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards each back in the mode it had."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
