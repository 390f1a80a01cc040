"""Count the bytes that tensors hold while code runs, on any device and on the meta device in particular."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@final
class LiveBytes(TorchDispatchMode):
    """Within this block, `now` is what tensors that were made in it hold, and `peak` the most so far.

    A storage counts once, however many tensors view it, from the operation that made it until the last of
    them is gone: what an allocator without fragmentation would have to hold.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Do not count the storages of `existing`, such as parameters."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
