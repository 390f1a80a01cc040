"""Noise and time of flow matching, drawn for each sample from (seed, epoch, sample, draw).

Randomness belongs to the sample, not to the process or the moment: neither the number of processes, nor the
order of loading, nor an interruption changes what a sample is trained on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlafit.nn.flow import time_from_uniform

TRAINING, VALIDATION, DROPOUT = 0, 1, 2  # streams that never share a draw


def dropout_seed(keys: Sequence[tuple[int, int]], *, seed: int, step: int) -> int:
    """Return what to seed torch's generator with before a micro-batch, from which dropout draws.

    A pure function of the step and of the micro-batch's first sample: a run that was interrupted draws the
    same again, and so does the same run once more. Several processes draw each for their own samples.
    """
    epoch, index = keys[0]
    philox = np.random.Philox(key=[seed, index], counter=[step, 0, epoch, DROPOUT])
    return int(np.random.Generator(philox).integers(2**63))


def noise_and_time(
    keys: Sequence[tuple[int, int]],
    *,
    seed: int,
    draws: int,
    chunk: int,
    action_dim: int,
    stream: int = TRAINING,
) -> tuple[Tensor, Tensor]:
    """Return noise [k, b, t, a] ~ N(0, 1) and time [k, b] for samples named by (epoch, index).

    Both are float32 on the CPU. The counter-based generator (Philox) makes each sample's draws a pure
    function of its key.
    """
    noise = np.empty((draws, len(keys), chunk, action_dim), np.float32)
    uniform = np.empty((draws, len(keys)), np.float64)
    for row, (epoch, index) in enumerate(keys):
        philox = np.random.Philox(key=[seed, index], counter=[0, 0, epoch, stream])
        generator = np.random.Generator(philox)
        uniform[:, row] = generator.random(draws)
        noise[:, row] = generator.standard_normal((draws, chunk, action_dim), np.float32)
    return torch.from_numpy(noise), time_from_uniform(torch.from_numpy(uniform))
