"""W_p between two clouds as one differentiable number."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, masses, order_of, positive, refuse, same_space
from torch_otprune.transport.cost import ground_cost, root
from torch_otprune.transport.dispatch import Choice, Problem, Purpose, choose
from torch_otprune.transport.divergence import Divergence, divergence_report
from torch_otprune.transport.exact import match, solve_exact
from torch_otprune.transport.line import wasserstein_1d
from torch_otprune.transport.matching import few, point_costs, root_mean_square, shortest_paths

__all__ = ["wasserstein"]


@overload
def wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: Literal[False] = False,
) -> Float[Tensor, ""]: ...


@overload
def wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: Literal[True],
) -> Divergence: ...


def wasserstein(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: bool = False,
) -> Float[Tensor, ""] | Divergence:
    """Measure W_p: exactly where the table finds that cheap, debiased elsewhere.

    Args:
        x: points of one measure.
        y: points of the other, in the same space.
        a: weights of x, scaled to total 1; None is uniform.
        b: weights of y, likewise.
        p: order of the distance, at least 1.
        eps: temperature of the divergence that takes over for large clouds, positive.
        solver: `line` (one dimension), `exact`, one of `scaling`, `geomloss` (also called `keops`)
            and `blocks`, which all give the divergence, or `auto`.
        explain: return a `Divergence`, with all lines that were passed over in its `why`.

    Returns:
        the distance in the unit of the points, differentiable in x and y. An exact distance has
        the exact gradient of its frozen plan (Danskin).

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> round(float(wasserstein(x, x + torch.tensor([3.0, 4.0]))), 4)
        5.0
        >>> wasserstein(x, x + 1, explain=True).solver
        'exact'
    """
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    positive(eps, "eps")
    y = y.to(x)
    choice = _choice(x, y, a is None and b is None, solver)
    if choice.solver == "line":
        distance = wasserstein_1d(x, y, a, b, p=p)[0]
    elif choice.solver == "exact":
        distance = _exact(x, y, a, b, p=p)
    else:
        found = divergence_report(x, y, a, b, p=p, eps=eps, solver=choice.solver)
        return replace(found, why=choice.told(True)) if explain else found.distance
    if not explain:
        return distance
    return Divergence(distance, choice.solver, choice.told(True), 0.0, 0.0, left_out=0.0)


def _exact(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *, p: float) -> Tensor:
    """Price the frozen optimal plan."""
    n, m = len(x), len(y)
    if a is None and b is None and n == m:
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


def _choice(x: Tensor, y: Tensor, uniform: bool, solver: str) -> Choice:
    (n, d), live = x.shape, x.requires_grad or y.requires_grad
    refuse(
        solver == "line" and d != 1,
        f"points of {d} dimensions are on no line.",
        where="wasserstein, argument solver",
        fix="pass points of one dimension, or use sliced.",
    )
    purpose: Purpose = "gradient" if live else "value"
    return _looked_up((n, len(y), d), x.device.type, uniform, purpose, solver)


@lru_cache(maxsize=256)
def _looked_up(
    sizes: tuple[int, int, int], device: str, uniform: bool, purpose: Purpose, solver: str
) -> Choice:
    """Ask the table once for each kind of problem: asking takes as long as few points do."""
    problem = Problem(*sizes, device, purpose, uniform)
    return choose(problem, solver, where="wasserstein, argument solver")
