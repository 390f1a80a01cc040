"""Random numbers that belong to the samples of a batch, not to a process or a moment.

Every row draws from a counter-based generator (Philox) of its own, keyed by what names the sample: (seed,
epoch, index) in training, (seed, task, episode, replan) in rollouts. So neither the number of processes, nor
the rest of the batch, nor an interruption changes what a sample is trained on or how a policy acts.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from vlafit.types import EpisodeKey

TRAINING, VALIDATION, DROPOUT = 0, 1, 2  # streams that never share a draw

BESIDE = 2**32  # added to a stream's number for `SampleRng.side`

Keys = Sequence[tuple[int, int]]
"""(epoch, sample index) of each row."""


@final
class SampleRng:
    """The random numbers of a batch: one generator for each row, advanced by every call.

    `draws` is how many draws of its randomness a policy should average its loss over (`train.draws`).
    Numbers are drawn on the CPU, so that every device gets the same ones; move them where they are used.
    """

    def __init__(self, generators: Sequence[np.random.Generator], draws: int = 1) -> None:
        self._generators = tuple(generators)
        self.draws = draws

    def __len__(self) -> int:
        return len(self._generators)

    def side(self) -> "SampleRng":
        """Return other random numbers of the same rows, which change none of these.

        They depend on what has been drawn before, so ask before the first draw.
        """
        return SampleRng([_beside(generator) for generator in self._generators], self.draws)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal float32 [b, *shape]."""
        values = np.empty((len(self), *shape), np.float32)
        for row, generator in enumerate(self._generators):
            values[row] = generator.standard_normal(shape, np.float32)
        return torch.from_numpy(values)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float64 [b, *shape] from [0, 1)."""
        values = np.empty((len(self), *shape), np.float64)
        for row, generator in enumerate(self._generators):
            values[row] = generator.random(shape)
        return torch.from_numpy(values)


def _beside(generator: np.random.Generator) -> np.random.Generator:
    """Return a generator of the same key, whose counter no other stream reaches."""
    state: Any = generator.bit_generator.state["state"]
    counter = [int(word) for word in state["counter"]]
    counter[3] += BESIDE
    key = [int(word) for word in state["key"]]
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_rng(keys: Keys, *, seed: int, draws: int = 1, stream: int = TRAINING) -> SampleRng:
    """Return the random numbers of training samples named by (epoch, index)."""
    return SampleRng(
        [
            np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, epoch, stream]))
            for epoch, index in keys
        ],
        draws,
    )


def rollout_rng(keys: Sequence[EpisodeKey], *, seed: int) -> SampleRng:
    """Return the random numbers of calls of a policy in rollouts, the same in every process."""
    generators = []
    for key in keys:
        task = int.from_bytes(hashlib.sha256(key.task.encode()).digest()[:8], "big")
        source = np.random.SeedSequence([seed, task, key.seed, key.replan])
        generators.append(np.random.Generator(np.random.Philox(source)))
    return SampleRng(generators)


def dropout_seed(keys: Keys, *, seed: int, step: int) -> int:
    """Return what to seed torch's generator with before a micro-batch, from which dropout draws.

    A pure function of the step and of the micro-batch's first sample: a run that was interrupted draws the
    same again, and so does the same run once more. Several processes draw each for their own samples.
    """
    epoch, index = keys[0]
    philox = np.random.Philox(key=[seed, index], counter=[step, 0, epoch, DROPOUT])
    return int(np.random.Generator(philox).integers(2**63))
