"""Two measures in, one Coupling out: balanced, unbalanced or semi-relaxed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.ask import HARD, Ask, consistent, prices, sound
from torch_otprune.transport.checks import cloud, finite, masses, order_of, refuse, same_space
from torch_otprune.transport.couple import Coupling
from torch_otprune.transport.dispatch import Choice, Problem, choose
from torch_otprune.transport.exact import Links, solve_exact, solve_line
from torch_otprune.transport.geometry import Cloud, Geometry, Stored, softmin
from torch_otprune.transport.keops import available, softmin_keops
from torch_otprune.transport.matching import DIRECT, few, point_costs, shortest_paths
from torch_otprune.transport.reduce import principal
from torch_otprune.transport.sinkhorn import Potentials, damping, log_domain, scaling

__all__ = ["coupling", "coupling_points", "couplings"]

EPS = 0.02  # of the mean cost, where a temperature is needed and none was given
KEPT = 64  # dimensions from which a cost that fits is kept with its plan, not computed again
LITTLE = 2**22  # entries up to which it is kept in any dimension: 16 MiB in float32


def coupling(
    cost: Float[Tensor, "n m"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    eps: float | None = None,
    relax: tuple[float, float] = HARD,
    solver: str = "auto",
    tol: float = 1e-3,
    limit: int = 5000,
    explain: bool = False,
) -> Coupling:
    """Move one measure onto another at the least cost.

    Args:
        cost: ground cost, finite.
        a: source weights; None is uniform with total 1.
        b: target weights; None likewise.
        eps: temperature, relative to the mean size of the cost; None takes an exact plan where
            the table finds it cheap and 0.02 elsewhere, 0 insists on an exact one.
        relax: price of a wrong source and target marginal, relative to the mean cost: infinity is
            a hard marginal, 0 a free one; (inf, 0) is the semi-relaxed problem.
        solver: a line of the dispatch table, or `auto`.
        tol: marginal error at which an entropic solver stops, as a share of the mass.
        limit: iterations an entropic solver may spend.
        explain: put all lines that were passed over into `why`.

    Returns:
        the coupling, on the device of the cost.

    Raises:
        TransportError: if totals differ under hard marginals, or 1 % of the mass stays misplaced.

    Source: Cuturi 2013; Chizat et al. 2018 for Kullback-Leibler marginals.

    Example:
        >>> coupling(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).plan()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    cost = finite(cost, "cost").detach()
    refuse(
        cost.ndim != 2 or 0 in cost.shape,
        f"a cost of shape {tuple(cost.shape)} couples nothing.",
        where="coupling, argument cost",
        fix="pass a matrix, sources x targets; for a batch use couplings.",
    )
    return _solve(Stored(cost), a, b, Ask(eps, prices(relax), solver, tol, limit, explain))


def coupling_points(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float | None = None,
    relax: tuple[float, float] = HARD,
    solver: str = "auto",
    tol: float = 1e-3,
    limit: int = 5000,
    explain: bool = False,
    dims: int | None = None,
) -> Coupling:
    """Move one cloud onto another under the cost |x - y|^p, however large they are.

    Args:
        x: source points.
        y: target points, in the same space.
        a: source weights; None is uniform.
        b: target weights; None is uniform.
        p: order of the distance; `coupling.cost ** (1 / p)` is W_p.
        eps: as in `coupling`.
        relax: as in `coupling`.
        solver: as in `coupling`; `line` needs one dimension.
        tol: as in `coupling`.
        limit: as in `coupling`.
        explain: as in `coupling`.
        dims: principal directions to keep first; None keeps 64 where costs do not fit in memory.

    Returns:
        the coupling; `left_out` says how much of the variance a reduction dropped.
    """
    x, y, p = cloud(x, "x").detach(), cloud(y, "y").detach(), order_of(p)
    same_space(x, y)
    y = y.to(x)
    plain = a is None and b is None and eps is None and relax == HARD
    if plain and solver == "auto" and dims is None and not explain and few(x, y):
        found = _matched(x, y, p)
        if found is not None:
            return found
    ask = Ask(eps, prices(relax), solver, tol, limit, explain)
    x, y, left_out = principal(x, y, dims)
    found = _solve(Cloud(x, y, p), a, b, ask)
    return replace(found, left_out=left_out) if left_out else found


def couplings(
    costs: Float[Tensor, "batch n m"],
    a: Float[Tensor, "batch n"] | None = None,
    b: Float[Tensor, "batch m"] | None = None,
    *,
    eps: float | None = None,
    relax: tuple[float, float] = HARD,
    solver: str = "auto",
    tol: float = 1e-3,
    limit: int = 5000,
    explain: bool = False,
) -> list[Coupling]:
    """Solve many problems of one shape together, one batch of matrix products per iteration.

    Args:
        costs: ground costs, finite.
        a: source weights, one row per problem or one for all; None is uniform.
        b: target weights, likewise.
        eps: as in `coupling`; None solves them one by one where exact plans are cheap.
        relax: as in `coupling`.
        solver: as in `coupling`; only `scaling`, which `auto` takes at any temperature, solves
            all of them together.
        tol: as in `coupling`.
        limit: as in `coupling`.
        explain: as in `coupling`.

    Returns:
        one coupling per problem, each the same as `coupling` would find alone, to `tol`.
    """
    costs = finite(costs, "costs").detach()
    ask = Ask(eps, prices(relax), solver, tol, limit, explain)
    sound(ask)
    consistent(ask, 0)
    refuse(
        costs.ndim != 3 or 0 in costs.shape,
        f"costs of shape {tuple(costs.shape)} are no batch of problems.",
        where="couplings, argument costs",
        fix="pass problems x sources x targets; for one matrix use coupling.",
    )
    a, b = masses(a, costs, costs.shape[1], "a"), masses(b, costs, costs.shape[2], "b")
    together = solver == "scaling" or (solver == "auto" and bool(eps))
    found = _together(costs, a, b, ask=ask) if together else None
    if found is not None:
        return found
    return [_solve(Stored(cost), x, y, ask) for cost, x, y in zip(costs, a, b, strict=True)]


def _together(costs: Tensor, a: Tensor, b: Tensor, *, ask: Ask) -> list[Coupling] | None:
    """Scale all kernels at once, or find nothing where one of them does not converge."""
    for x, y in zip(a, b, strict=True):
        _same_total(x, y, ask.relax)
    relative = ask.eps or EPS
    heat = relative * costs.abs().mean((1, 2))
    heat = heat.where(heat > 0, heat.new_ones(()))
    damp = (damping(ask.relax[0], relative), damping(ask.relax[1], relative))
    found = scaling(costs, a, b, heat, damp=damp, tol=ask.tol, limit=ask.limit)
    if found is None or float(found.error.max()) > ask.tol:
        return None
    choice = choose(Problem(costs.shape[1], costs.shape[2], entropic=True), "scaling")
    if ask.solver == "auto":
        shared = f"{len(costs)} problems of one shape share every matrix product"
        choice = replace(choice, why=shared)
    why = choice.told(ask.explain)
    return [
        _coupling(
            Stored(cost), x, y, eps=float(h), solver="scaling", why=why, found=_item(found, i)
        )
        for i, (cost, x, y, h) in enumerate(zip(costs, a, b, heat, strict=True))
    ]


def _matched(x: Tensor, y: Tensor, p: float) -> Coupling | None:
    """Couple few points of equal mass, or nothing where the table or the data ask for more."""
    n, d = x.shape
    choice = _usual(n, d)
    if choice.solver != "exact":
        return None
    cost = point_costs(x, y, p=p)
    if cost[0, 0] <= cost[0].min():  # perhaps paired samples, which have a solver of their own
        return None
    columns = shortest_paths(cost)
    # Costs by matmul have lost digits that the plan's own cost should show.
    total = float(cost[np.arange(n), columns].sum()) / n if d <= DIRECT else None
    a, rows = x.new_full((n,), 1 / n), torch.arange(n, device=x.device)
    links = Links(rows, torch.from_numpy(columns), a.double(), single=True, total=total)
    return Coupling(Cloud(x, y, p), a, a, 0.0, "exact", choice.why, links=links)


@lru_cache(maxsize=256)
def _usual(n: int, d: int) -> Choice:
    return choose(Problem(n, n, d))


def _solve(geometry: Geometry, a: Tensor | None, b: Tensor | None, ask: Ask) -> Coupling:
    (n, m), like = geometry.shape, geometry.like
    sound(ask)
    plain = a is None and b is None
    a, b = masses(a, like, n, "a"), masses(b, like, m, "b")
    if not plain:
        b = _same_total(a, b, ask.relax)
    uniform = plain or (_equal(a) and _equal(b))
    choice = _choice(geometry, uniform, ask)
    work = geometry if choice.solver != "exact" else Stored(geometry.block(slice(None)))
    if choice.solver != "line" and _paired(work, plain or torch.equal(a, b), ask):
        choice = Choice("paired", "no target is nearer to any source than its own partner", ())
    why = choice.told(ask.explain)
    links = _links(work, a, b, choice.solver, uniform)
    if links is not None:
        return Coupling(geometry, a, b, 0.0, choice.solver, why, links=links)
    scale = geometry.mean() or 1.0
    eps = scale * (ask.eps or EPS)
    refuse(
        not eps >= torch.finfo(like.dtype).tiny,
        f"a temperature of {eps:.2g} is no number of {like.dtype}.",
        where="coupling, argument cost",
        fix="scale the cost, or pass it in float64.",
    )
    if choice.solver == "scaling" and (like.shape[1] > KEPT or n * m <= LITTLE):
        geometry = Stored(geometry.block(slice(None)))
    found = _entropic(geometry, a, b, ask, eps=eps, solver=choice.solver)
    return _coupling(geometry, a, b, eps=eps, solver=choice.solver, why=why, found=found)


def _coupling(
    geometry: Geometry,
    a: Tensor,
    b: Tensor,
    *,
    eps: float,
    solver: str,
    why: str,
    found: Potentials,
) -> Coupling:
    dual, error = (found.f, found.g), float(found.error)
    return Coupling(geometry, a, b, eps, solver, why, error, found.iterations, dual=dual).checked()


def _item(found: Potentials, i: int) -> Potentials:
    return Potentials(found.f[i], found.g[i], found.error[i], found.iterations)


def _same_total(a: Tensor, b: Tensor, relax: tuple[float, float]) -> Tensor:
    """Refuse unequal totals where both marginals are hard; take off what rounding left."""
    if relax != HARD:
        return b
    left, right = float(a.sum(dtype=torch.float64)), float(b.sum(dtype=torch.float64))
    refuse(
        abs(left - right) > 1e-3 * left,
        f"a mass of {left:g} cannot become a mass of {right:g}.",
        where="coupling, arguments a and b",
        fix="scale both weights to total 1, or relax a marginal.",
    )
    return b * (left / right)


def _equal(weights: Tensor) -> bool:
    low, high = (float(end) for end in weights.aminmax())
    return high - low <= 1e-6 * high


def _choice(geometry: Geometry, uniform: bool, ask: Ask) -> Choice:
    (n, m), like = geometry.shape, geometry.like
    d = geometry.x.shape[1] if isinstance(geometry, Cloud) else 0
    consistent(ask, d)
    if ask.relax == (math.inf, 0.0) and not ask.eps and ask.solver == "auto":
        return Choice("nearest", "a free second marginal lets every source take its nearest", ())
    if ask.eps == 0 and ask.solver == "auto" and d != 1:
        refuse(
            ask.relax != HARD,
            "eps=0 with a relaxed marginal has no exact solver here.",
            where="coupling, arguments eps and relax",
            fix="pass eps=0.01.",
        )
        return Choice("exact", "eps=0 insists on an exact plan", ())
    known = not isinstance(geometry, Cloud) or geometry.p in {1, 2}  # to KeOps
    problem = Problem(
        n,
        m,
        d,
        like.device.type,
        "plan",
        uniform=uniform,
        hard=ask.relax == HARD,
        entropic=bool(ask.eps),
        keops=available if known else lambda: False,
    )
    return choose(problem, ask.solver, where="coupling, argument solver")


def _paired(geometry: Geometry, same: bool, ask: Ask) -> bool:
    """Recognise paired samples: if every partner is a nearest target, the identity is optimal."""
    n, m = geometry.shape
    if n != m or ask.eps or ask.relax != HARD or ask.solver != "auto" or not same:
        return False
    # A few rows decide almost every case.
    for rows in (slice(0, min(n, 16)), *geometry.slices()):
        cost = geometry.block(rows)
        own = cost.diagonal(offset=rows.start)
        if bool((cost.amin(1) < own).any()):
            return False
    return True


def _links(geometry: Geometry, a: Tensor, b: Tensor, solver: str, uniform: bool) -> Links | None:
    """Solve exactly, where that is the choice."""
    if solver == "line" and isinstance(geometry, Cloud):
        return solve_line(geometry.x[:, 0], geometry.y[:, 0], a, b, uniform=uniform)
    if solver == "exact":
        return solve_exact(geometry.block(slice(None)), a, b, uniform=uniform)
    if solver == "paired":
        both = torch.arange(len(a), device=a.device)
        return Links(both, both, a, single=uniform)
    if solver == "nearest":
        best = torch.cat([cost.argmin(1) for _, cost in geometry.blocks()])
        rows = torch.arange(len(a), device=a.device)
        return Links(rows, best, a, geometry.pairs(rows, best), torch.zeros_like(b))
    return None


def _entropic(
    geometry: Geometry, a: Tensor, b: Tensor, ask: Ask, *, eps: float, solver: str
) -> Potentials:
    """Iterate at one temperature; what scaling cannot finish, the float64 log domain does."""
    relative = ask.eps or EPS
    damp = (damping(ask.relax[0], relative), damping(ask.relax[1], relative))
    if solver == "scaling":
        stored = geometry.block(slice(None))
        heat = stored.new_tensor([eps])
        found = scaling(
            stored[None], a[None], b[None], heat, damp=damp, tol=ask.tol, limit=ask.limit
        )
        if found is not None and float(found.error) <= ask.tol:
            return _item(found, 0)
        geometry = Stored(stored.double())
    rows, columns = _softmins(geometry, solver)
    start = 4 * (geometry.mean() or 1.0)
    dtype = geometry.like.dtype
    return log_domain(
        rows, columns, a.to(dtype), b.to(dtype), eps,
        start=start, damp=damp, tol=ask.tol, limit=ask.limit,
    )  # fmt: skip


Softmin = Callable[[Tensor, float], Tensor]


def _softmins(geometry: Geometry, solver: str) -> tuple[Softmin, Softmin]:
    if solver == "keops" and isinstance(geometry, Cloud):
        x, y, p = geometry.x, geometry.y, geometry.p
        return (
            lambda h, eps: softmin_keops(x, y, h, eps, p),
            lambda h, eps: softmin_keops(y, x, h, eps, p),
        )
    back = geometry.transposed()
    return (lambda h, eps: softmin(geometry, h, eps), lambda h, eps: softmin(back, h, eps))
