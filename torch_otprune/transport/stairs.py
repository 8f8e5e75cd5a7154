"""Prices on the line: what proves a sorted coupling optimal, without a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.exact import Links
from torch_otprune.transport.geometry import Cloud

__all__ = ["line_duals"]


def line_duals(cloud: Cloud, links: Links) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Find potentials that prove a sorted coupling optimal: f + g <= C, with equality on links.

    Args:
        cloud: points of one dimension.
        links: their coupling, in ascending order.

    Returns:
        potentials of sources and targets, in the unit of the cost, in float64.

    Source: the north-west corner rule is optimal for Monge costs (Hoffman 1963), whatever the
    weights, so the prices along its staircase are feasible.
    """
    cloud = Cloud(cloud.x.double(), cloud.y.double(), cloud.p)
    rows, columns = _stairs(links.rows, links.columns)
    step = cloud.pairs(rows, columns).diff()
    down = rows.diff() != 0
    zero = step.new_zeros(())
    f, g = (
        cloud.x.new_full((len(cloud.x),), torch.inf),
        cloud.y.new_full((len(cloud.y),), torch.inf),
    )
    start = cloud.pairs(rows[:1], columns[:1])
    f[rows] = torch.cat([start * 0, step.where(down, zero).cumsum(0)])
    g[columns] = torch.cat([start, start + step.where(~down, zero).cumsum(0)])
    # Points without mass are on no stair: they take the highest price that all others allow.
    f = _priced(f, cloud, g)
    return f, _priced(g, Cloud(cloud.y, cloud.x, cloud.p), f)


def _stairs(
    rows: Int[Tensor, " links"], columns: Int[Tensor, " links"]
) -> tuple[Int[Tensor, " cells"], Int[Tensor, " cells"]]:
    """Put a cell into every corner, so that neighbours share a row or a column."""
    corner = torch.stack([rows[:-1], columns[1:]])
    both = torch.stack([torch.stack([rows[:-1], columns[:-1]]), corner], dim=2).reshape(2, -1)
    both = torch.cat([both, torch.stack([rows[-1:], columns[-1:]])], dim=1)
    return both[0], both[1]


def _priced(own: Tensor, cloud: Cloud, other: Tensor) -> Tensor:
    """Fill in prices that are still infinite."""
    bare, known = own.isinf().nonzero()[:, 0], other.isfinite().nonzero()[:, 0]
    rest = Cloud(cloud.x[bare], cloud.y[known], cloud.p)
    for rows, cost in rest.blocks():
        own[bare[rows]] = (cost - other[known]).amin(1)
    return own
