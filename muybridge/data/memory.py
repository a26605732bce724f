"""What a process keeps of what it has read, up to so many bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memory(Generic[T]):
    """Values by key; those used last, of so many bytes together. Threads may share it.

    Args:
        limit: Bytes kept. One value that alone is larger is kept until the next comes.
        size_of: Bytes of a value.
    """

    def __init__(self, limit: int, size_of: Callable[[T], int]) -> None:
        self.limit, self.size_of, self.size = limit, size_of, 0
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not here (any more); what fails to be made is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        # Outside of the lock, since it takes long: two threads may make one value, and one of the two is kept.
        value = make()
        size = self.size_of(value)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = value, size
                self.size += size
            while self.size > self.limit and len(self._kept) > 1:
                _, (_, old) = self._kept.popitem(last=False)
                self.size -= old
        return value
