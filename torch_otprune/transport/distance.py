"""W_p between two clouds as one differentiable number."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, masses, order_of, refuse, same_space
from torch_otprune.transport.cost import ground_cost, root
from torch_otprune.transport.dispatch import Problem, choose
from torch_otprune.transport.divergence import divergence
from torch_otprune.transport.exact import match, solve_exact
from torch_otprune.transport.line import wasserstein_1d
from torch_otprune.transport.matching import few, point_costs, root_mean_square, shortest_paths

__all__ = ["wasserstein"]

# What the divergence calls the solvers that the table may name.
DEBIASED = {
    "scaling": "scaling",
    "keops": "geomloss",
    "geomloss": "geomloss",
    "blocks": "blocks",
}


def wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
) -> Float[Tensor, ""]:
    """Measure W_p: exactly where the table finds that cheap, debiased elsewhere.

    Args:
        x: points of one measure.
        y: points of the other, in the same space.
        a: weights of x, scaled to total 1; None is uniform.
        b: weights of y, likewise.
        p: order of the distance, at least 1.
        eps: temperature of the divergence that takes over for large clouds.
        solver: `line` (one dimension), `exact`, one of `scaling`, `keops`, `geomloss` and `blocks`,
            which all give the divergence, or `auto`.

    Returns:
        the distance in the unit of the points, differentiable in x and y. An exact distance has
        the exact gradient of its frozen plan (Danskin).

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> round(float(wasserstein(x, x + torch.tensor([3.0, 4.0]))), 4)
        5.0
    """
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    y = y.to(x)
    (n, d), m, plain = x.shape, y.shape[0], a is None and b is None
    if solver == "auto":
        solver = _solver(n, m, d, x.device.type, plain)
    else:
        _known(solver, d)
    if solver == "line":
        return wasserstein_1d(x, y, a, b, p=p)[0]
    if solver != "exact":
        return divergence(x, y, a, b, p=p, eps=eps, solver=DEBIASED[solver])
    if plain and n == m:
        return _matched(x, y, p)
    weights = masses(a, x, n, "a"), masses(b, y, m, "b")
    scaled = (w / w.sum() for w in weights)
    links = solve_exact(ground_cost(x.detach(), y.detach(), p=p), *scaled)
    squared = (x[links.rows] - y[links.columns]).square().sum(1)
    return root((root(squared, 2 / p) * links.mass.to(x)).sum(), p)


def _matched(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Pair equally many points of equal mass."""
    left, right = x.detach(), y.detach()
    if few(left, right):
        columns = torch.from_numpy(shortest_paths(point_costs(left, right, p=p)))
    else:
        columns = match(ground_cost(left, right, p=p))
    if p == 2:
        return root_mean_square(x, y, columns)
    length = torch.linalg.vector_norm(x - y.index_select(0, columns), dim=1)
    return root(length.pow(p).mean(), p)


def _known(solver: str, d: int) -> None:
    """Refuse a forced solver that does not exist, or not for these points."""
    names = ("line", "exact", *DEBIASED)
    refuse(
        solver not in names,
        f"there is no solver {solver!r}.",
        where="wasserstein, argument solver",
        fix=f"use one of auto, {', '.join(names)}.",
    )
    refuse(
        solver == "line" and d != 1,
        f"points of {d} dimensions are on no line.",
        where="wasserstein, argument solver",
        fix="pass points of one dimension, or use sliced.",
    )


@lru_cache(maxsize=256)
def _solver(n: int, m: int, d: int, device: str, uniform: bool) -> str:
    return choose(Problem(n, m, d, device, "value", uniform)).solver
