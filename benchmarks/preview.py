"""Time the preview of strategies with adapters on pi0 of its public size, on the meta device.

    OMP_NUM_THREADS=1 python benchmarks/preview.py

To compare commits, run it in turns with PYTHONPATH set to each checkout.
"""

import time

import peft  # noqa: F401 - its import is not what is measured
import torch

from vlafit.policies.pi0 import SIZES, Pi0
from vlafit.tuning import load_strategy, preview


def main() -> None:
    """Print the seconds of each preview."""
    with torch.device("meta"):
        policy = Pi0(SIZES["pi0"])
    for name in ("lora", "dora", "adalora"):
        strategy = load_strategy(name)
        began = time.perf_counter()
        preview(policy, strategy)
        print(f"{name}: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
