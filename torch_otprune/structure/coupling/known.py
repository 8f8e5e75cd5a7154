"""What is known of tensors, by identity, for as long as they live."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Known", "Shared"]

_V = TypeVar("_V")


class Known(Generic[_V]):
    """A table by tensor: an entry counts only while the very tensor it was written for lives.

    The table of torch compares two weak references at each look-up, which costs more than most
    ops that are looked up.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], _V]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __setitem__(self, tensor: Tensor, value: _V) -> None:
        self._entries[id(tensor)] = weakref.ref(tensor), value

    def __getitem__(self, tensor: Tensor) -> _V:
        found = self.get(tensor)
        if found is None:
            raise KeyError(tuple(tensor.shape))
        return found

    def get(self, tensor: Tensor) -> _V | None:
        """Look a tensor up.

        Args:
            tensor: any.

        Returns:
            None where nothing was written for it, or for another that had its place in memory.
        """
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def take(self, tensor: Tensor) -> _V | None:
        """Look a tensor up, and forget it.

        Args:
            tensor: any.

        Returns:
            as `get`.
        """
        found = self.get(tensor)
        self._entries.pop(id(tensor), None)
        return found


class Shared:
    """Which tensors look at the same memory."""

    def __init__(self) -> None:
        self._by_storage: dict[int, dict[int, weakref.ref[Tensor]]] = defaultdict(dict)

    def add(self, tensor: Tensor) -> None:
        """Note whose memory a tensor looks at."""
        here = self._by_storage[tensor.untyped_storage()._cdata]
        here[id(tensor)] = weakref.ref(tensor)

    def mates(self, tensor: Tensor) -> list[Tensor]:
        """List the others that look at a tensor's memory.

        Args:
            tensor: any.

        Returns:
            those that live, in the order in which they were noted.
        """
        here = self._by_storage[tensor.untyped_storage()._cdata]
        found = []
        for key, weak in list(here.items()):
            mate = weak()
            if mate is None:
                del here[key]
            elif mate is not tensor:
                if hasattr(mate, "_fix_weakref"):
                    mate._fix_weakref()  # torch may hold it for Python; now we do
                found.append(mate)
        return found
