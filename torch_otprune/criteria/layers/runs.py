"""Sets of blocks: what they cost together, and how they nest."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking

__all__ = ["greedy", "joint", "nested", "priced_runs", "runs"]


def runs(gone: Collection[int]) -> list[tuple[int, int]]:
    """Split a set of blocks into its maximal contiguous runs.

    Args:
        gone: block numbers.

    Returns:
        first and last block of each run, in order.
    """
    found: list[tuple[int, int]] = []
    for block in sorted(gone):
        if found and found[-1][1] == block - 1:
            found[-1] = (found[-1][0], block)
        else:
            found.append((block, block))
    return found


def joint(price: Sequence[Sequence[float]], gone: Collection[int]) -> float:
    """Price a set of blocks: the sum over its runs.

    Args:
        price: `price[i][j]` of removing blocks i to j.
        gone: block numbers.

    Returns:
        the sum, 0 for nobody.
    """
    return sum(price[first][last] for first, last in runs(gone))


def priced_runs(span: Float[Tensor, "blocks blocks"]) -> Float[Tensor, "blocks blocks"]:
    """Price the runs that are longer than the spans that were tried, as spans in a row.

    Args:
        span: cost of replacing blocks i to j by one map; infinite where not tried.

    Returns:
        the same with every entry on or above the diagonal finite.
    """
    price = span.clone()
    for length in range(2, len(price) + 1):
        for i in range(len(price) - length + 1):
            j = i + length - 1
            if torch.isinf(price[i, j]):
                price[i, j] = (price[i, i:j] + price[i + 1 : j + 1, j]).min()
    return price


def nested(gone: Sequence[int], spent: Sequence[float]) -> Ranking:
    """Turn an order of removal into a ranking.

    Args:
        gone: all blocks, the first to go first.
        spent: what removing the first one, the first two, ... costs.

    Returns:
        the ranking; its curve never falls as blocks go.
    """
    costs = torch.tensor([0.0, *spent], dtype=torch.float64, device="cpu")
    return Ranking(torch.tensor(list(gone)[::-1], device="cpu"), costs.cummax(0).values.flip(0))


def greedy(price: Float[Tensor, "blocks blocks"]) -> Ranking:
    """Remove one block after the other, each time the one that adds least to the joint cost.

    Args:
        price: cost of every run.

    Returns:
        the ranking.
    """
    table: list[list[float]] = price.tolist()
    gone: list[int] = []
    spent: list[float] = []
    left = list(range(len(table)))
    while left:
        # Of equal ones the last goes, as in every other ranking.
        cost, block = min((joint(table, [*gone, b]), -b) for b in left)
        gone.append(-block)
        spent.append(cost)
        left.remove(-block)
    return nested(gone, spent)
