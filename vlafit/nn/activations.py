"""Activation functions, with the same bits for a row at each place in a batch where that is promised.

On a CPU torch computes most numbers of a thread's share of a tensor by vector instructions and the rest, up
to 63 numbers at its end, one by one. In SiLU, GELU by tanh and sigmoid the two differ in the last bit (in
GELU by erf, ReLU and tanh they do not). Where a row's share of memory is no multiple of a vector, a row's
place in the batch would then decide its bits. In the context `same_rows` such a batch is computed row by
row. Policies call these functions, and not torch's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 64  # numbers: two vectors of AVX-512 in bfloat16, the most that a kernel takes at once
GRAIN = 32768  # at::internal::GRAIN_SIZE of torch: no thread is given fewer numbers if there are more
_WIDTH: ContextVar[int] = ContextVar("width of batches whose rows are computed alike", default=1)


@contextmanager
def same_rows(width: int) -> Iterator[None]:
    """Within it, a row of a batch of `width` rows has the same bits at each place in the batch, on a CPU."""
    token = _WIDTH.set(width)
    try:
        yield
    finally:
        _WIDTH.reset(token)


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    return _by_rows(F.silu, x)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return _by_rows(torch.sigmoid, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its approximation by tanh."""
    return _by_rows(_gelu_tanh, x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute `function` of each row of [width * n, ...] by itself where its place would decide its bits."""
    if torch.compiler.is_compiling() or not x.is_cpu or (width := _WIDTH.get()) == 1:
        return function(x)
    if x.shape[0] % width or _aligned(x, width):
        return function(x)
    return torch.cat([function(row) for row in x.contiguous().chunk(width)])


def _aligned(x: Tensor, width: int) -> bool:
    """Return whether each row, and each thread's share of them, is a whole number of vectors."""
    numbers = x.numel()
    threads = max(1, min(torch.get_num_threads(), math.ceil(numbers / GRAIN)))
    share = math.ceil(numbers / threads)
    return x.is_contiguous() and numbers // width % STEP == 0 and share % STEP == 0
