"""Count, without a GPU, the memory that a training step's kernels read and write, and how many there are.

    python -m benchmarks.traffic --sizes pi0 --strategies full lora expert --shapes padded

Run it in the repository's root. Forward and backward pass run on the meta device, as the forecast of memory
does, in bf16 with the kernels of a GPU. Each operation that makes or changes numbers (no view) counts as a
kernel that reads its operands and writes its results: eager, without fusing. Counted with one row and with
two, so that what grows with the rows (a sample's) is told from what does not (a step's: casts of weights).
The optimiser is not counted. Bytes are in 10^9. attention is the calls of the forward pass, masked those of
them with a mask, for which a slower kernel may run.
"""

import argparse
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import rows, train
from benchmarks.rows import Row
from vlafit.nn.meta_kernels import MetaKernels
from vlafit.nn.rng import sample_rng
from vlafit.train.fit import workload
from vlafit.train.forecast import prepare
from vlafit.tuning import preview

COLUMNS = ("size", "strategy", "shape", "sample_gb", "step_gb", "kernels", "attention", "masked")
ATTENTION = "aten::_scaled_dot_product_efficient_attention"


@final
class Traffic(TorchDispatchMode):
    """Within this block, `bytes` is what operations read and write, and `kernels` how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = self.attention = self.masked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_iter(result) if isinstance(one, Tensor)]
        if made and not func.is_view and func.name() not in NO_KERNEL:
            self.kernels += 1
            if func.name() == ATTENTION:
                self.attention += 1
                self.masked += args[3] is not None
            self.bytes += sum(map(_touched, tree_iter((args, kwargs)))) + sum(map(_touched, made))
        return result


NO_KERNEL = {
    f"aten::{name}" for name in ("empty", "detach", "alias", "_unsafe_view", "lift_fresh", "empty_strided")
}


def _touched(value: object) -> int:
    """Return the bytes of a tensor that lie in memory: an expanded one is read where it is."""
    if not isinstance(value, Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    numbers = 1
    for size, stride in sizes:
        numbers *= size if stride else 1
    return numbers * value.element_size()


def counted(point: Row) -> Row:
    """Return a sample's and a step's traffic of a point of `benchmarks.train`, and a step's kernels."""
    taken = []
    for samples in (1, 2):
        recipe, policy, strategy, batch = train.on_meta(point | {"batch": samples})
        work = workload(recipe, batch.image_mask.shape[1], batch.prompt()[0].shape[1])
        kernels = MetaKernels(bf16=work.precision == "bf16", cached=work.recompute == "none")
        prepare(policy, preview(policy, strategy), work, kernels)
        batch = batch.to("meta")
        with Traffic() as seen, kernels:
            rng = sample_rng([(0, row) for row in range(samples)], seed=0, draws=work.draws)
            loss = torch.stack(list(policy(batch, rng).values())).sum()
            kernels.forget()
            loss.backward()
        taken.append(seen)
    one, two = taken
    counts = {"kernels": one.kernels, "attention": one.attention, "masked": one.masked}
    sample = two.bytes - one.bytes
    return {"sample_gb": sample / 1e9, "step_gb": (one.bytes - sample) / 1e9, **counts}


def table(options: argparse.Namespace) -> Iterable[Row]:
    """Yield a row for each point, with what is counted."""
    for point in train.points_of(options):
        yield point | counted(point)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pi0"], choices=list(rows.sizes()))
    parser.add_argument("--strategies", nargs="+", default=["full", "expert", "lora"])
    parser.add_argument("--shapes", nargs="+", default=["padded", "libero"], choices=("padded", "libero"))
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    own = parser.parse_args()
    words = ["--sizes", *own.sizes, "--strategies", *own.strategies, "--shapes", *own.shapes]
    print(rows.table(list(table(train.parser().parse_args([*words, "--recompute", own.recompute]))), COLUMNS))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
