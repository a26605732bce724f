"""What a process keeps of what it has read or made, up to so many bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Optional, TypeVar

T = TypeVar("T")

_LOCK = threading.Lock()
"""One for all: a memory with its own could not be copied along with the job that has it."""


class Memory(Generic[T]):
    """Values by key; those used last, of so many bytes together. Threads may share it.

    Args:
        limit: Bytes kept. One value that alone is larger is kept until the next comes.
        size_of: Bytes of a value.
    """

    def __init__(self, limit: int, size_of: Callable[[T], int]) -> None:
        self.limit, self.size_of, self.size = limit, size_of, 0
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable) -> Optional[T]:
        """The value of a key, if it is still here."""
        with _LOCK:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: T) -> None:
        """Keep one, and forget those not used for longest."""
        size = self.size_of(value)
        with _LOCK:
            self.size += size - self._kept.pop(key, (value, 0))[1]
            self._kept[key] = value, size
            while self.size > self.limit and len(self._kept) > 1:
                _, (_, old) = self._kept.popitem(last=False)
                self.size -= old

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not here (any more); what fails to be made is not kept."""
        found = self.find(key)
        if found is None:
            # Outside of the lock, since it takes long: two threads may make one value, and one of the two is kept.
            found = make()
            self.put(key, found)
        return found
