"""Keep the most recently used values of a store: open files, tables, decoded columns."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key; beyond a total size of `most` the least recently used are dropped.

    `size` is that of a value, 1 by default, so that values are counted. At least `least` values are kept,
    whatever their size. `drop` is called with the key and the value of each one that is dropped.
    """

    def __init__(
        self,
        most: int,
        *,
        size: Callable[[V], int] | None = None,
        least: int = 1,
        drop: Callable[[K, V], None] | None = None,
    ) -> None:
        self.most = most
        self._size, self._least, self._drop = size, least, drop
        self._values: OrderedDict[K, V] = OrderedDict()
        self._total = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`, made now if it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        self._total += self._size_of(value)
        while self._total > self.most and len(self._values) > self._least:
            self._drop_oldest()
        return value

    def forget(self, wanted: Callable[[K], bool]) -> None:
        """Remove the keys for which `wanted` is true, without calling `drop`."""
        for key in [key for key in self._values if wanted(key)]:
            self._total -= self._size_of(self._values.pop(key))

    def clear(self) -> None:
        """Drop everything."""
        while self._values:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key, value = self._values.popitem(last=False)
        self._total -= self._size_of(value)
        if self._drop is not None:
            self._drop(key, value)

    def _size_of(self, value: V) -> int:
        return 1 if self._size is None else self._size(value)
