"""Second moments of a layer's input, of a size that does not depend on how much is seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["WIDE", "Moments", "add_gram_", "ridge_factor"]

WIDE = 32_768  # channels: products of all pairs would take 8 GiB, so that rows stand for them

_NARROW = 512  # columns that one product handles as fast as two halves


@dataclass
class Moments:
    """Streaming sums of rows and of their products, in float64.

    Args:
        total: sum of rows.
        product: sum of outer products.
        count: rows seen.
    """

    total: Float[Tensor, " columns"]
    product: Float[Tensor, "columns columns"]
    count: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device | None = None) -> Moments:
        """Start with nothing seen.

        Args:
            columns: width of a row.
            device: where to sum.

        Returns:
            zeros.
        """
        zeros = torch.zeros(columns, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(columns, columns, dtype=torch.float64, device=device))

    def update(self, rows: Float[Tensor, "rows columns"]) -> None:
        """Add rows.

        Args:
            rows: any floating type; summed in float64.
        """
        rows = rows.detach().double()
        self.total += rows.sum(0)
        add_gram_(self.product, rows)
        self.count += len(rows)

    @property
    def mean(self) -> Float[Tensor, " columns"]:
        """Average the rows seen."""
        return self.total / max(self.count, 1)

    def second(self, *, centred: bool) -> Float[Tensor, "columns columns"]:
        """Average the outer products.

        Args:
            centred: about the mean, so that it is the covariance.

        Returns:
            symmetric, positive semi-definite up to rounding.
        """
        second = self.product / max(self.count, 1)
        return second - torch.outer(self.mean, self.mean) if centred else second

    @staticmethod
    def bytes(columns: int) -> int:
        """Tell the memory that moments of a width take.

        Args:
            columns: width of a row.

        Returns:
            bytes.
        """
        return 8 * columns * (columns + 1)


def add_gram_(total: Float[Tensor, "columns columns"], rows: Float[Tensor, "rows columns"]) -> None:
    """Add the products of all columns with each other, each pair computed once.

    Args:
        total: what to add to, in place; symmetric.
        rows: in the type of `total`.
    """
    width = rows.shape[1]
    if width <= _NARROW:
        total.addmm_(rows.T, rows)
        return
    half = width // 2
    add_gram_(total[:half, :half], rows[:, :half])
    add_gram_(total[half:, half:], rows[:, half:])
    mixed = rows[:, :half].T @ rows[:, half:]
    total[:half, half:] += mixed
    total[half:, :half] += mixed.T


def ridge_factor(
    second: Float[Tensor, "columns columns"], ridge: float
) -> Float[Tensor, "columns columns"]:
    """Factor moments after lifting them by a share of their mean diagonal.

    Moments of a signal that hardly varies are rounding errors, and may not even be positive;
    the lift grows until they are.

    Args:
        second: symmetric, positive semi-definite up to rounding; left as it was.
        ridge: share of the mean diagonal to start with.

    Returns:
        the lower Cholesky factor.
    """
    scale = max(float(second.diagonal().mean()), float(second.abs().max()) * 1e-3, 1e-12)
    lift = ridge * scale
    while True:
        lifted = second.clone()
        lifted.diagonal().add_(lift)
        factor, info = torch.linalg.cholesky_ex(lifted)
        if not int(info):
            found: Tensor = factor
            return found
        lift *= 10
