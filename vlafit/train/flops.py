"""Count the arithmetic of a training step on the meta device, and hold it against the peak of the device.

Only products of matrices, convolutions and attention count, a multiplication and an addition as two. What
recomputing activations repeats does not count: these are the operations that the model needs. A shape
of a policy of billions of parameters takes seconds, so it is counted once, when it is first logged.
"""

from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlafit.nn.meta_kernels import MetaKernels
from vlafit.nn.policy import Policy
from vlafit.nn.rng import sample_rng
from vlafit.policies import family, family_name
from vlafit.train.batch_shape import BatchShape
from vlafit.train.forecast import Workload, full_batch, prepare
from vlafit.tuning import Plan

BF16_TFLOPS = {  # dense products in bfloat16 with fp32 sums; NVIDIA's data sheets, 2026-11
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}
"""By the exact name that torch gives the device."""


def peak_flops(given: float, device: torch.device, precision: str) -> float | None:
    """Return the peak of one device in FLOP/s; None where it is not known.

    `given` is `train.peak_tflops`, which comes first where it is above 0. A peak is never estimated: it is
    known for products in bfloat16 on the GPUs of `BF16_TFLOPS`.
    """
    if given:
        return given * 1e12
    if device.type != "cuda" or precision != "bf16":
        return None
    known = BF16_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if known is None else known * 1e12


class FlopCounter:
    """Counts the operations of forward and backward pass for the stage of a plan, once for each shape."""

    def __init__(self, policy: Policy, plan: Plan, draws: int, *, kept: str | None = None) -> None:
        """Count for the plan's stage of `policy`; nothing is copied before the first count.

        Features of the kind `kept` come from a cache, and are not counted.
        """
        self._policy, self._plan, self._draws, self._kept = policy, plan, draws, kept
        self._copy = cache(self._bare)
        self._of_row = cache(self._count)

    def __call__(self, shape: BatchShape) -> int:
        """Return the operations of a micro-batch. They grow with its rows, which do not see each other."""
        return shape.rows * self._of_row(shape.cameras, shape.tokens, shape.targets)

    def _bare(self) -> Policy:
        bare = family(family_name(self._policy)).build(self._policy.config, "meta").to("meta")
        workload = Workload(1, precision="fp32", frozen="fp32", draws=self._draws)
        prepare(bare, self._plan, workload, _kernels())
        return bare

    def _count(self, cameras: int, tokens: int, targets: int) -> int:
        bare = self._copy()
        batch = full_batch(bare.needs(), 1, cameras, tokens, targets).to("meta")
        if self._kept is not None:
            with _kernels():
                batch = replace(batch, features=bare.features(self._kept, batch))
        with _kernels(), FlopCounterMode(display=False) as counter:
            sums = bare(batch, sample_rng([(0, 0)], seed=0, draws=self._draws))
            torch.stack(list(sums.values())).sum().backward()
        bare.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def _kernels() -> MetaKernels:
    return MetaKernels(bf16=False, cached=False)
