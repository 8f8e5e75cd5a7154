"""Where the ground cost lives: stored as a matrix, or recomputed block by block from points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.cost import ground_cost, root

__all__ = ["Cloud", "Geometry", "Stored", "softmin"]

CACHE = 2**20  # entries that stay in the cache between a product and its reduction
BLOCK = 2**21  # entries of the cost held at a time when it is not stored


class Geometry(ABC):
    """A cost matrix that can be read by blocks of rows."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Count sources and targets."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Give a tensor whose dtype and device the potentials share."""

    @abstractmethod
    def block(self, rows: slice) -> Float[Tensor, "rows m"]:
        """Compute or look up some rows of the cost."""

    @abstractmethod
    def pairs(self, rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Compute or look up single entries."""

    @abstractmethod
    def transposed(self) -> Geometry:
        """Swap sources and targets."""

    @abstractmethod
    def mean(self) -> float:
        """Average the size of the cost over all pairs."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows."""
        for rows in self.slices():
            yield rows, self.block(rows)

    def slices(self) -> list[slice]:
        """Cut the rows so that a block of the cost stays small."""
        step = max(1, BLOCK // self.shape[1])
        return [slice(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]


@dataclass(frozen=True)
class Stored(Geometry):
    """A cost given as a matrix."""

    cost: Float[Tensor, "n m"]

    @property
    def shape(self) -> tuple[int, int]:
        """Count sources and targets."""
        return self.cost.shape[0], self.cost.shape[1]

    @property
    def like(self) -> Tensor:
        """Give the matrix."""
        return self.cost

    def block(self, rows: slice) -> Float[Tensor, "rows m"]:
        """Look up rows."""
        return self.cost[rows]

    def pairs(self, rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Look up single entries."""
        return self.cost[rows, columns]

    def transposed(self) -> Geometry:
        """Swap sources and targets."""
        return Stored(self.cost.T)

    def mean(self) -> float:
        """Average the cost over all pairs."""
        return float(self.cost.abs().mean(dtype=torch.float64))


@dataclass(frozen=True)
class Cloud(Geometry):
    """The cost |x - y|^p between two clouds, never stored whole."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "m d"]
    p: float

    @property
    def shape(self) -> tuple[int, int]:
        """Count sources and targets."""
        return len(self.x), len(self.y)

    @property
    def like(self) -> Tensor:
        """Give the sources."""
        return self.x

    def block(self, rows: slice) -> Float[Tensor, "rows m"]:
        """Compute rows."""
        return ground_cost(self.x[rows], self.y, p=self.p)

    def pairs(self, rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Compute single entries."""
        gap = self.x.index_select(0, rows) - self.y.index_select(0, columns)
        squared = gap.square_().sum(1)
        return root(squared, 2 / self.p) if self.p != 2 else squared

    def transposed(self) -> Geometry:
        """Swap sources and targets."""
        return Cloud(self.y, self.x, self.p)

    def mean(self) -> float:
        """Average the cost over all pairs, or over an even thousandth where no formula helps."""
        if self.p == 2:
            x, y = self.x.double(), self.y.double()
            spread = x.var(0, correction=0).sum() + y.var(0, correction=0).sum()
            return float(spread + (x.mean(0) - y.mean(0)).square().sum())
        x, y = (c[:: max(1, len(c) // 1024)] for c in (self.x, self.y))
        return float(ground_cost(x, y, p=self.p).mean(dtype=torch.float64))


def softmin(geometry: Geometry, h: Float[Tensor, " m"], eps: float) -> Float[Tensor, " n"]:
    """Compute -eps log sum_j exp(h_j - C_ij / eps) for every source, in the unit of the cost."""
    if isinstance(geometry, Cloud) and geometry.p == 2:
        return _softmin_squared(geometry.x, geometry.y, h, eps)
    out = torch.empty_like(geometry.like[:, 0])
    for rows, cost in geometry.blocks():
        out[rows] = torch.logsumexp(h - cost / eps, dim=1)
    return out.mul_(-eps)


def _softmin_squared(x: Tensor, y: Tensor, h: Tensor, eps: float) -> Tensor:
    """Expand the square: what depends on one side alone moves out of the product."""
    centre = y.mean(0)
    x, y = x - centre, y - centre
    tilt, own = h - y.square().sum(1) / eps, x.square().sum(1)
    step = max(1, CACHE // len(y))
    # Results go into one tensor: small ones kept between large ones would break up the heap.
    out = torch.empty_like(own)
    for i in range(0, len(x), step):
        power = torch.addmm(tilt, x[i : i + step], y.T, alpha=2 / eps)
        out[i : i + step] = torch.logsumexp(power, dim=1)
    return own - eps * out
