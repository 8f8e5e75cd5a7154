"""Which labels belong together, and why some cannot go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["KEPT", "Forest", "Objection"]

KEPT = -1
"""The label of a place that no unit owns: it always stays."""


@dataclass(frozen=True)
class Objection:
    """Why a unit cannot go.

    Args:
        kind: `output`, `norm` (a norm or a mean takes all of them together), `fixed` (the other
            operand does not follow), `shape`, `mix`, `unknown`.
        said: the reason, in one clause.
    """

    kind: str
    said: str


class Forest:
    """Union-find over labels, on whole arrays at once."""

    def __init__(self) -> None:
        self.parent = np.array([KEPT])  # its last place is that of -1: `KEPT` is its own root
        self.size = 0
        self.objections: list[tuple[Tensor, Objection]] = []

    def grow(self, count: int) -> Tensor:
        """Make new labels.

        Args:
            count: how many.

        Returns:
            int64, `count`: the labels, each alone.
        """
        first, self.size = self.size, self.size + count
        if self.size >= len(self.parent):
            old = self.parent[:-1]
            self.parent = np.arange(max(2 * self.size, 1024), dtype=np.int64)
            self.parent[: len(old)], self.parent[-1] = old, KEPT
        return torch.arange(first, self.size, device="cpu")

    def roots(self, labels: Tensor) -> Tensor:
        """Name every label after its set.

        Args:
            labels: int64, any shape; `KEPT` stays.

        Returns:
            the same shape.
        """
        found = labels.numpy()
        named = self._named(found)
        return labels if named is found else torch.from_numpy(named)

    def _named(self, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first, above, steps = found, self.parent[found], 0
        while np.count_nonzero(above != found):
            found, above, steps = above, self.parent[above], steps + 1
        if steps > 1:
            self.parent[first] = above  # a shorter way next time
        return above if steps else first

    def union(self, first: Tensor, second: Tensor) -> bool:
        """Join the sets of two arrays of labels, place by place.

        Args:
            first: int64, any shape.
            second: int64, the same shape; at a place where one is `KEPT` nothing is joined.

        Returns:
            whether something was joined.
        """
        a, b = first.reshape(-1).numpy(), second.reshape(-1).numpy()
        differ = (a != b) & (a >= 0) & (b >= 0)
        a, b, joined = a[differ], b[differ], False
        while len(a):
            a, b = self._named(a), self._named(b)
            apart = a != b
            a, b = a[apart], b[apart]
            if len(a):  # of several wishes for one root the lowest wins; others come round again
                joined = True
                np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))
        return joined

    def object(self, labels: Tensor, kind: str, said: str) -> None:
        """Note why the units of these labels cannot go.

        Args:
            labels: int64, any shape.
            kind: as in `Objection`.
            said: as in `Objection`.
        """
        owned = torch.unique(labels)
        owned = owned[owned >= 0]
        if len(owned):
            self.objections.append((owned, Objection(kind, said)))
