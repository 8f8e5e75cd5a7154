"""Few points of equal mass: one call for the costs, one for the assignment, nothing around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from torch_otprune.transport.cost import ground_cost

__all__ = ["DIRECT", "WARM", "few", "point_costs", "root_mean_square", "shortest_paths"]

WARM = 200  # points from which potentials are worth their price before an assignment
DIRECT = 16  # dimensions up to which costs by difference in double are faster than a matmul


def few(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> bool:
    """Say whether two clouds are small enough for the functions of this file."""
    return x.is_cpu and x.shape[0] < WARM and x.shape == y.shape


def point_costs(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, p: float
) -> Float64[np.ndarray[Any, Any], "n n"]:
    """Raise all distances to the power p, in double, for few points."""
    if x.shape[1] > DIRECT:
        return ground_cost(x, y, p=p).double().numpy()
    cost: Float64[np.ndarray[Any, Any], "n n"] = _scipy()[0](x.numpy(), y.numpy(), "sqeuclidean")
    return cost if p == 2 else cost ** (p / 2)


def shortest_paths(
    cost: Float64[np.ndarray[Any, Any], "n m"],
) -> Int64[np.ndarray[Any, Any], " n"]:
    """Give every row its own column at the least total cost.

    Args:
        cost: ground cost, no more rows than columns.

    Returns:
        the column of each row.

    Source: shortest augmenting paths (Crouse 2016) after the column reduction of Jonker &
    Volgenant 1987.
    """
    columns: Int64[np.ndarray[Any, Any], " n"] = _scipy()[1](cost - cost.min(0))[1]
    return columns


def root_mean_square(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], columns: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Measure how far matched points are apart, with derivative 0 where all of them coincide."""
    # One node for autograd, whose engine costs more than the arithmetic of few points.
    total: Tensor = torch.dist(x, y.index_select(0, columns))
    return total / math.sqrt(x.shape[0])


@cache
def _scipy() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Import once: a statement that finds its module loaded still takes a microsecond."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    return cdist, linear_sum_assignment
