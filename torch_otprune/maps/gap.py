"""How far a map is from moving its points as cheaply as can be: the Monge gap."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.maps.elastic import Elastic
from torch_otprune.transport import assignment, coupling, ground_cost, sqdist
from torch_otprune.transport.checks import cloud, positive, refuse, same_space
from torch_otprune.transport.cost import root

__all__ = ["Cost", "cost_matrix", "monge_gap", "paid"]

Cost = Literal["squared", "euclidean"] | Elastic

_BLOCK = 2**22  # numbers of pairwise differences held at a time


def monge_gap(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m e"],
    *,
    cost: Cost = "squared",
    eps: float = 0.01,
    solver: Literal["sinkhorn", "exact"] = "sinkhorn",
) -> Float[Tensor, ""]:
    """Measure what moving x to y row by row costs above the cheapest way to the same cloud.

    Args:
        x: points.
        y: where a map sends each of them, in the same order and space.
        cost: `squared` is |x − y|², `euclidean` is |x − y|, or an `Elastic`.
        eps: temperature relative to the mean cost, for `sinkhorn`.
        solver: `sinkhorn`, centred so that it is never negative and tends to `exact` with eps; or
            `exact`, by assignment.

    Returns:
        the gap per point, in the unit of the cost; 0 for an optimal map. Its derivative in y is
        Danskin's: the coupling is held still.

    Source: Uscidda & Cuturi 2023. The identity is one coupling of entropy log n, so the entropic
    value lies below the paid cost by at least eps log n, which is taken off here.
    """
    x, y = cloud(x, "x"), cloud(y, "y")
    same_space(x, y)
    refuse(
        len(x) != len(y),
        f"{len(x)} points and {len(y)} images do not match.",
        where="monge_gap, arguments x and y",
        fix="pass the image of every point, in the same order.",
    )
    positive(eps, "eps")
    refuse(
        solver not in ("sinkhorn", "exact"),
        f"{solver!r} is no solver of the gap.",
        where="monge_gap, argument solver",
        fix="use 'sinkhorn' or 'exact'.",
    )
    costs, bill = cost_matrix(x, y, cost), paid(x, y, cost).mean()
    fixed = costs.detach()
    if solver == "exact":
        least = costs[torch.arange(len(x), device=x.device), assignment(fixed)].mean()
        return bill - least
    if float(fixed.abs().amax()) == 0:
        return bill
    found = coupling(fixed, eps=eps)
    plan = found.plan()
    entropy = float(torch.special.entr(plan).sum())
    return bill - found.cost_of(costs) + found.eps * (entropy - math.log(len(x)))


def paid(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], cost: Cost = "squared"
) -> Float[Tensor, " n"]:
    """Price moving each row of x to the same row of y."""
    if isinstance(cost, Elastic):
        return cost.value(x - y)
    squared = (x - y).square().sum(1)
    return squared if cost == "squared" else root(squared)


def cost_matrix(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], cost: Cost = "squared"
) -> Float[Tensor, "n m"]:
    """Price moving every row of x to every row of y.

    Args:
        x: sources.
        y: targets.
        cost: as in `monge_gap`.

    Returns:
        the matrix, differentiable in both.
    """
    if not isinstance(cost, Elastic):
        refuse(
            cost not in ("squared", "euclidean"),
            f"{cost!r} is no cost of a displacement.",
            where="argument cost",
            fix="use 'squared', 'euclidean' or an `Elastic`.",
        )
        return ground_cost(x, y, p=2.0 if cost == "squared" else 1.0)
    half = sqdist(x, y) / 2
    if cost.reg == "l1":
        return half + cost.weight * torch.cdist(x, y, p=1.0)
    step = max(1, _BLOCK // max(y.numel(), 1))
    parts = [cost.penalty(rows[:, None] - y[None]) for rows in x.split(step)]
    return half + cost.weight * torch.cat(parts)
