"""Exact optimal transport: assignment, sorted lines, and a screened linear program."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import finite, refuse
from torch_otprune.transport.dispatch import REPEAT
from torch_otprune.transport.matching import WARM, shortest_paths
from torch_otprune.transport.sinkhorn import scaling

__all__ = ["Links", "assignment", "duals", "match", "order", "solve_exact", "solve_line"]


@dataclass(frozen=True)
class Links:
    """A sparse plan: mass moved from rows to columns.

    Args:
        rows: source of each link.
        columns: target of each link.
        mass: what it carries.
        f: dual potential of the sources, where the solver knows it.
        g: dual potential of the targets.
        single: whether every source has exactly one link, with all of its mass.
        total: sum of cost x mass, where the solver knows it.
    """

    rows: Int[Tensor, " links"]
    columns: Int[Tensor, " links"]
    mass: Float[Tensor, " links"]
    f: Float[Tensor, " n"] | None = None
    g: Float[Tensor, " m"] | None = None
    single: bool = False
    total: float | None = None

    def to(self, device: torch.device) -> Links:
        """Move everything to a device."""
        f, g = (None if part is None else part.to(device) for part in (self.f, self.g))
        rows, columns, mass = (part.to(device) for part in (self.rows, self.columns, self.mass))
        return Links(rows, columns, mass, f, g, self.single, self.total)


def assignment(cost: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """Give every row its own column at the least total cost.

    Args:
        cost: finite costs, no more rows than columns.

    Returns:
        the column of each row.

    Raises:
        TransportError: if there are more rows than columns, or a cost is not finite.

    Source: shortest augmenting paths (Crouse 2016), as in scipy.

    Example:
        >>> assignment(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        tensor([1, 0])
    """
    cost = finite(cost, "cost")
    if cost.ndim != 2 or cost.shape[0] > cost.shape[1]:
        raise TransportError(
            f"a cost of shape {tuple(cost.shape)} has no column for every row.",
            where="assignment, argument cost",
            fix="pass a matrix with no more rows than columns, or transpose it.",
        )
    return _augmenting_paths(cost.detach())


def match(cost: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """Pair equally many sources and targets of equal mass at the least total cost.

    Args:
        cost: ground cost, checked already.

    Returns:
        the target of each source.
    """
    # Augmenting paths end sooner on reduced costs; few points do with a reduction of columns.
    if len(cost) >= WARM:
        return _augmenting_paths(_reduced(cost))
    return torch.from_numpy(shortest_paths(cost.cpu().double().numpy())).to(cost.device)


def solve_exact(
    cost: Float[Tensor, "n m"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    *,
    uniform: bool | None = None,
) -> Links:
    """Solve balanced transport exactly, by the cheapest exact solver that fits the weights.

    Args:
        cost: ground cost.
        a: source weights.
        b: target weights, of equal total.
        uniform: whether all weights of a side are equal; None looks.

    Returns:
        at most n + m - 1 links after merging, in float64.
    """
    n, m = cost.shape
    copies = math.lcm(n, m)
    uniform = _uniform(a) and _uniform(b) if uniform is None else uniform
    if uniform and copies <= max(REPEAT, n, m):
        return _by_assignment(cost, a, copies)
    x, y = a.double().cpu(), b.double().cpu()
    return _by_program(cost.double().cpu(), x, y * (x.sum() / y.sum())).to(cost.device)


def solve_line(
    x: Float[Tensor, " n"],
    y: Float[Tensor, " m"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    *,
    uniform: bool | None = None,
) -> Links:
    """Couple two measures on the line in sorted order, optimal for every convex cost.

    Args:
        x: source positions.
        y: target positions.
        a: source weights.
        b: target weights, of equal total.
        uniform: whether all weights of a side are equal; None looks.

    Returns:
        at most n + m - 1 links.

    Source: Peyré & Cuturi 2019, Remark 2.30.
    """
    xs, ys = order(x), order(y)
    uniform = _uniform(a) and _uniform(b) if uniform is None else uniform
    if uniform and len(xs) == len(ys):
        return Links(xs, ys, a.double(), single=True)
    left, right = a.double()[xs].cumsum(0), b.double()[ys].cumsum(0)
    right = right * (left[-1] / right[-1])
    level = torch.cat([left, right]).sort().values
    mass = level.diff(prepend=level.new_zeros(1))
    middle = level - mass / 2
    real = mass > 1e-14 * left[-1]
    i = torch.searchsorted(left, middle[real]).clamp(max=len(x) - 1)
    j = torch.searchsorted(right, middle[real]).clamp(max=len(y) - 1)
    return Links(xs[i], ys[j], mass[real])


def duals(cost: Float[Tensor, "n m"], links: Links) -> tuple[Tensor, Tensor]:
    """Find potentials that prove an exact plan optimal: f + g <= C, with equality on links.

    Args:
        cost: ground cost.
        links: an optimal plan.

    Returns:
        potentials of sources and targets, in the unit of the cost, in float64.
    """
    if links.f is not None and links.g is not None:
        return links.f, links.g
    cost = cost.double()
    on = cost[links.rows, links.columns]
    g, least = cost.new_zeros(cost.shape[1]), cost.new_full((len(cost),), torch.inf)
    for _ in range(sum(cost.shape)):  # Bellman-Ford: no shortest path visits a node twice
        slack = least.scatter_reduce(0, links.rows, g[links.columns] - on, "amin")
        new = torch.minimum(g, (cost + slack[:, None]).amin(0))
        if torch.equal(new, g):
            break
        g = new
    return (cost - g).amin(1), g


def order(x: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Sort positions; on a CPU by numpy, whose vector sort is several times faster."""
    if x.device.type != "cpu":
        return x.sort(stable=True).indices
    return torch.from_numpy(np.argsort(x.detach().contiguous().numpy()))


def _uniform(weights: Tensor) -> bool:
    low, high = (float(end) for end in weights.aminmax())
    return high - low <= 1e-6 * high


def _by_assignment(cost: Tensor, a: Tensor, copies: int) -> Links:
    n, m = cost.shape
    if n == m:
        return Links(torch.arange(n, device=cost.device), match(cost), a.double(), single=True)
    reduced = _reduced(cost) if copies >= WARM else cost
    big = reduced.repeat_interleave(copies // n, 0).repeat_interleave(copies // m, 1)
    rows = torch.arange(copies, device=cost.device) // (copies // n)
    columns = _augmenting_paths(big) // (copies // m)
    link, count = (rows * m + columns).unique(return_counts=True)
    return Links(link // m, link % m, count * (a.sum(dtype=torch.float64) / copies))


def _augmenting_paths(cost: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    columns = linear_sum_assignment(cost.cpu().double().numpy())[1]
    return torch.from_numpy(columns).to(cost.device)


def _reduced(cost: Tensor) -> Tensor:
    """Take entropic potentials off a cost, which changes no optimal plan."""
    n, m = cost.shape
    eps = 0.02 * cost.mean(dtype=torch.float64).to(cost)
    if not eps > 0:
        return cost
    a, b = cost.new_full((1, n), 1 / n), cost.new_full((1, m), 1 / m)
    rough = scaling(cost[None], a, b, eps[None], tol=0.01, limit=30)
    if rough is None:
        return cost
    return cost.double() - rough.f[0][:, None].double() - rough.g[0].double()


def _by_program(cost: Tensor, a: Tensor, b: Tensor) -> Links:
    """Solve the linear program on the few links that could matter, until the rest prove idle."""
    # Solve sparse, verify by duals (Schmitzer 2016); that an entropic solution names the first
    # links is ours.
    n, m = cost.shape
    scale = float(cost.abs().mean()) or 1.0
    active = _promising(cost, a, b, scale)
    for _ in range(100):
        rows, columns = active.nonzero(as_tuple=True)
        mass, f, g = _highs(cost[rows, columns], rows, columns, a, b)
        reduced = cost - f[:, None] - g
        reduced[active] = 0
        if float(reduced.min()) >= -1e-10 * scale:
            on = mass > 0
            return Links(rows[on], columns[on], mass[on], f, g)
        worst = reduced.topk(min(4, m), dim=1, largest=False)
        active[torch.arange(n, device=cost.device)[:, None], worst.indices] |= worst.values < 0
    raise TransportError(
        f"an exact plan of {n} x {m} was not certified in 100 rounds.",
        where="coupling, solver exact",
        fix="pass eps=0.01 for an entropic plan.",
    )


def _promising(cost: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Mark links of small reduced cost, and those of a plan that is surely feasible."""
    n, m = cost.shape
    eps = a.new_tensor([0.02 * scale])
    rough = scaling(cost[None], a[None], b[None], eps, tol=0.01, limit=200)
    reduced = cost if rough is None else cost - rough.f[0][:, None] - rough.g[0]
    active = torch.zeros(n, m, dtype=torch.bool, device=cost.device)
    few = min(6, n, m)
    active.scatter_(1, reduced.topk(few, 1, largest=False).indices, True)
    active.scatter_(0, reduced.topk(few, 0, largest=False).indices, True)
    left, right = (torch.arange(len(w), dtype=w.dtype, device=w.device) for w in (a, b))
    corner = solve_line(left, right, a, b)
    active[corner.rows, corner.columns] = True
    return active


def _highs(
    cost: Tensor, rows: Tensor, columns: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    n, m, k = len(a), len(b), len(cost)
    link = np.arange(k)
    where = np.concatenate([rows.numpy(), n + columns.numpy()])
    matrix = csr_matrix((np.ones(2 * k), (where, np.concatenate([link, link]))), shape=(n + m, k))
    # One marginal equation is redundant, and rounding must not make it contradict the others.
    sums = torch.cat([a, b])[:-1].numpy()
    total = sums.sum()
    answer = linprog(cost.numpy(), A_eq=matrix[:-1], b_eq=sums / total, method="highs")
    refuse(
        answer.status != 0,
        f"the linear program stopped: {answer.message}",
        where=f"coupling, solver exact, {n} x {m}",
        fix="pass eps=0.01 for an entropic plan.",
    )
    prices = torch.from_numpy(np.append(answer.eqlin.marginals, 0.0))
    return torch.from_numpy(answer.x * total), prices[:n], prices[n:]
