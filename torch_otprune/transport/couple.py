"""One object for every transport plan: how it was found, how far to trust it, how to use it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.checks import refuse
from torch_otprune.transport.exact import Links, duals
from torch_otprune.transport.geometry import Cloud, Geometry
from torch_otprune.transport.stairs import line_duals

__all__ = ["Coupling"]

REFUSE = 0.01  # share of mass in the wrong place beyond which a plan is not used


@dataclass(frozen=True, eq=False)
class Coupling:
    """A transport plan between two measures, formed only where it is asked for.

    Args:
        geometry: the ground cost, stored or recomputed.
        a: source weights.
        b: target weights.
        eps: entropic temperature in the unit of the cost; 0 where the plan is exact.
        solver: who found it.
        why: the reason for that choice.
        marginal_error: mass in the wrong place, as a share of the total.
        iterations: spent at the final temperature.
        left_out: share of the variance that a reduction of dimension dropped.
        links: the plan itself, where it is exact and so sparse.
        dual: potentials f and g, where it is entropic: P = a b exp((f + g - C) / eps).
    """

    geometry: Geometry
    a: Float[Tensor, " n"]
    b: Float[Tensor, " m"]
    eps: float
    solver: str
    why: str
    marginal_error: float = 0.0
    iterations: int = 0
    left_out: float = 0.0
    links: Links | None = None
    dual: tuple[Tensor, Tensor] | None = None

    @property
    def exact(self) -> bool:
        """Say whether the plan is optimal for the cost itself."""
        return self.links is not None

    @cached_property
    def potentials(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
        """Give the dual potentials; for an exact plan they prove it optimal."""
        if self.dual is not None:
            return self.dual
        assert self.links is not None
        if self.solver == "line" and isinstance(self.geometry, Cloud):
            f, g = line_duals(self.geometry, self.links)
            return f.to(self.geometry.like), g.to(self.geometry.like)
        cost = self.geometry.block(slice(None))
        f, g = duals(cost, self.links)
        return f.to(cost), g.to(cost)

    @cached_property
    def cost(self) -> float:
        """Sum cost x mass over the plan: W_p^p where the cost is a distance to the power p."""
        if self.links is None:
            return math.fsum(_priced(plan, cost) for _, cost, plan in self._blocks())
        if self.links.total is not None:
            return self.links.total
        on = self.geometry.pairs(self.links.rows, self.links.columns)
        return float(on.double() @ self.links.mass.double())

    def cost_of(self, cost: Float[Tensor, "n m"] | None) -> Float[Tensor, ""]:
        """Price the frozen plan under a cost, differentiably in that cost.

        Args:
            cost: another cost of the same shape; None is the plan's own.

        Returns:
            sum of cost x plan. At the plan's own cost its derivative is that of the optimal
            value (Danskin), for entropic plans of the regularised one.
        """
        if self.links is not None:
            rows, columns = self.links.rows, self.links.columns
            on = self.geometry.pairs(rows, columns) if cost is None else cost[rows, columns]
            return (on * self.links.mass.to(on)).sum()
        cost = self.geometry.block(slice(None)) if cost is None else cost
        return (cost * self._dense()).sum()

    def apply(self, values: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
        """Multiply the plan with values on the targets; nothing n x m is stored."""
        flat = values.reshape(len(values), -1)
        if self.links is not None:
            out = flat.new_zeros(len(self.a), flat.shape[1])
            moved = flat[self.links.columns] * self.links.mass.to(flat)[:, None]
            out = out.index_add(0, self.links.rows, moved)
        else:
            out = flat.new_empty(len(self.a), flat.shape[1])
            for rows, _, plan in self._blocks():
                out[rows] = plan.to(flat) @ flat
        return out.reshape(len(self.a), *values.shape[1:])

    def barycentric_map(self, values: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
        """Send every source to the mean of the values it is coupled with.

        Args:
            values: positions or signals on the targets.

        Returns:
            one mean per source, in the unit of the values; zero where no mass leaves.
        """
        if self.links is not None and self.links.single:
            out = values.new_empty(len(self.a), *values.shape[1:])
            out[self.links.rows] = values[self.links.columns]
            return out
        flat = values.reshape(len(values), -1)
        # One walk over the plan gives the sums and what they are divided by.
        out = self.apply(torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1))
        total = out[:, -1:]
        mean = out[:, :-1] / total.where(total > 0, total.new_ones(()))
        return mean.reshape(len(self.a), *values.shape[1:])

    def assignment(self) -> Int[Tensor, " n"]:
        """Name the target that receives most of each source; ties go to the lowest index."""
        if self.links is None:
            return torch.cat([plan.argmax(1) for _, _, plan in self._blocks()])
        rows, columns = self.links.rows, self.links.columns
        mass = self.links.mass.to(self.geometry.like)
        most = mass.new_zeros(len(self.a)).scatter_reduce(0, rows, mass, "amax")
        top = mass >= most[rows]
        first = columns.new_full((len(self.a),), len(self.b))
        first = first.scatter_reduce(0, rows[top], columns[top], "amin")
        return first.where(first < len(self.b), 0)  # what has no mass goes anywhere

    def plan(self) -> Float[Tensor, "n m"]:
        """Form the plan, n x m, as its potentials or links have it."""
        if self.links is not None:
            dense = self.geometry.like.new_zeros(len(self.a), len(self.b))
            index = (self.links.rows, self.links.columns)
            return dense.index_put(index, self.links.mass.to(dense), accumulate=True)
        return self._dense()

    def feasible(self) -> Float[Tensor, "n m"]:
        """Round a balanced plan so that it meets both marginals.

        Returns:
            masses within twice the marginal error of the plan, with sums a and b.

        Source: Altschuler, Weed & Rigollet 2017, Algorithm 2.
        """
        plan, a, b = self.plan().double(), self.a.double(), self.b.double()
        plan = plan * (a / plan.sum(1).clamp(min=1e-300)).clamp(max=1)[:, None]
        plan = plan * (b / plan.sum(0).clamp(min=1e-300)).clamp(max=1)
        rows, columns = (a - plan.sum(1)).clamp(min=0), (b - plan.sum(0)).clamp(min=0)
        left = rows.sum()
        return plan if left <= 0 else plan + rows[:, None] * columns / left

    def checked(self) -> Coupling:
        """Refuse a plan whose marginals are off by more than one part in a hundred."""
        refuse(
            not self.marginal_error <= REFUSE,
            f"the plan puts {self.marginal_error:.1%} of the mass in the wrong place.",
            where=f"coupling, solver {self.solver}, {len(self.a)} x {len(self.b)}",
            fix="raise eps, or raise the limit of iterations.",
        )
        return self

    def _dense(self) -> Tensor:
        """Form the plan, and its cost on the way, which nearly always is asked for as well."""
        plans, total = [], 0.0
        for _, cost, plan in self._blocks():
            plans.append(plan)
            total += _priced(plan, cost)
        self.__dict__["cost"] = total  # where `cached_property` looks
        return plans[0] if len(plans) == 1 else torch.cat(plans)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        assert self.dual is not None
        f, g = self.dual
        # Mass below the square root of the smallest normal number is none: subnormals are slow.
        least = 0.5 * math.log(torch.finfo(f.dtype).tiny)
        for rows, cost in self.geometry.blocks():
            power = torch.add(f[rows, None], g).sub_(cost).mul_(1 / self.eps)
            plan = torch.threshold_(power, least, -math.inf).exp_()
            yield rows, cost, plan.mul_(self.a[rows, None]).mul_(self.b)


def _priced(plan: Tensor, cost: Tensor) -> float:
    """Sum plan x cost: rows in their own precision, which is one short sum each, then in double."""
    # What the log domain finished is in double, whatever its cost is in.
    return float(torch.linalg.vecdot(plan, cost.to(plan)).sum(dtype=torch.float64))
