"""W_p between two clouds as one differentiable number."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, masses, order_of, same_space
from torch_otprune.transport.cost import ground_cost, root
from torch_otprune.transport.dispatch import Problem, choose
from torch_otprune.transport.divergence import divergence
from torch_otprune.transport.exact import match, solve_exact
from torch_otprune.transport.line import wasserstein_1d

__all__ = ["wasserstein"]


def wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
) -> Float[Tensor, ""]:
    """Measure W_p: exactly where the table finds that cheap, debiased elsewhere.

    Args:
        x: points of one measure.
        y: points of the other, in the same space.
        a: weights of x, scaled to total 1; None is uniform.
        b: weights of y, likewise.
        p: order of the distance, at least 1.
        eps: temperature of the divergence that takes over for large clouds.

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
    if x.shape[1] == 1:
        return wasserstein_1d(x, y, a, b, p=p)[0]
    if _solver(len(x), len(y), x.shape[1], x.device.type, a is None and b is None) != "exact":
        return divergence(x, y, a, b, p=p, eps=eps)
    if a is None and b is None and len(x) == len(y):
        return _matched(x, y, p)
    weights = masses(a, x, len(x), "a"), masses(b, y, len(y), "b")
    scaled = (w / w.sum() for w in weights)
    links = solve_exact(ground_cost(x.detach(), y.detach(), p=p), *scaled)
    squared = (x[links.rows] - y[links.columns]).square().sum(1)
    return root((root(squared, 2 / p) * links.mass.to(x)).sum(), p)


def _matched(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Pair equally many points of equal mass."""
    columns = match(ground_cost(x.detach(), y.detach(), p=p))
    gap = x - y.index_select(0, columns)
    if p == 2:
        # Like `root`, a norm has derivative 0 at 0.
        total: Tensor = torch.linalg.vector_norm(gap) / len(x) ** 0.5
        return total
    length = torch.linalg.vector_norm(gap, dim=1)
    return root(length.pow(p).mean(), p)


@lru_cache(maxsize=256)
def _solver(n: int, m: int, d: int, device: str, uniform: bool) -> str:
    return choose(Problem(n, m, d, device, "value", uniform)).solver
