"""Which unit joins which: couplings of units by their features, and the maps they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import RepairError
from torch_otprune.transport import Coupling, coupling, ground_cost, sqdist

__all__ = ["Cost", "Marginals", "Matching", "Target", "fused", "importance", "maps"]

Cost = Literal["l1", "l2", "cosine"]
Marginals = Literal["uniform", "importance", "unbalanced", "semi_relaxed"]
Target = Literal["topk", "kmeans", "barycenter"]

_ROUNDS = 20  # of moving centroids


@dataclass(frozen=True)
class Matching:
    """How units are coupled.

    Args:
        cost: between features.
        marginals: how much each target takes in.
        reach: price of an uneven share where marginals are unbalanced.
        eps: temperature relative to the mean cost; None or 0 is exact where there is a choice.
        solver: a line of the dispatch table.
    """

    cost: Cost = "l1"
    marginals: Marginals = "uniform"
    reach: float = 1.0
    eps: float | None = None
    solver: str = "auto"

    def couple(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Coupling:
        """Couple features, none of which is zero.

        Args:
            x: of the sources.
            y: of the targets.

        Returns:
            the coupling; sources have total 1.
        """
        relax = {"unbalanced": (math.inf, self.reach), "semi_relaxed": (math.inf, 0.0)}
        weighted = self.marginals == "importance"
        a, b = (importance(rows) if weighted else None for rows in (x, y))
        hard = relax.get(self.marginals, (math.inf, math.inf))
        # a free or hard marginal has an exact solver, which is what no temperature asks for
        eps = None if self.marginals != "uniform" and not self.eps else self.eps
        return coupling(self.priced(x, y), a, b, eps=eps, relax=hard, solver=self.solver)

    def copied(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Coupling:
        """Couple features so that, where targets are more, each takes in just one source.

        Args:
            x: of the sources.
            y: of the targets.

        Returns:
            the coupling: copies of a source differ by one at most in number. As `couple` finds
            it where targets are fewer or a multiple, or a temperature or a solver was asked for.
        """
        each, more = divmod(len(y), len(x))
        if self.eps or self.solver != "auto" or not more or not each:
            return self.couple(x, y)
        cost = self.priced(x, y).double()
        # an assignment of all copies: of the last of each source, some get a target of no price
        dear = float(cost.max()) * (len(y) + 1) + 1
        beside = cost.new_full((len(x) * (each + 1), len(x) - more), dear)
        beside[len(x) * each :] = 0
        every = torch.cat([cost.repeat(each + 1, 1), beside], dim=1)
        taken = coupling(every, eps=0).assignment() < len(y)
        share = taken.unflatten(0, (each + 1, len(x))).sum(0).double() / len(y)
        return coupling(cost, share, eps=0)

    def priced(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """Price moving any feature onto any other."""
        if self.cost == "l2":
            return ground_cost(x, y, p=1)
        x, y = _unit(x), _unit(y)
        return torch.cdist(x, y, p=1) if self.cost == "l1" else sqdist(x, y) / 2


def fused(
    x: Float[Tensor, "units features"],
    keep: Int[Tensor, " kept"],
    matching: Matching,
    target: Target = "topk",
) -> Float[Tensor, "units kept"]:
    """Couple all units of a group with as many targets as are kept.

    Args:
        x: features of the units.
        keep: the units in whose place the targets are.
        matching: how they are coupled.
        target: the kept units themselves; or centroids that start there, each the mean of the
            units nearest to it (k-means), or of its even share of them (a free-support
            barycenter with uniform weights).

    Returns:
        masses; nothing in the rows and columns of units whose features are all zero.

    Raises:
        RepairError: if a feature is not finite.

    Source: Cuturi & Doucet 2014, Algorithm 2, for the barycenter; k-means is the same with free
    target weights (Pollard 1982).
    """
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(1)).nonzero()[0])
        raise RepairError(
            f"unit {bad} has features that are NaN or infinite.",
            where="repair 'coupling'",
            fix="look for NaN or infinity in the weights or the calibration data.",
        )
    plan = x.new_zeros(len(x), len(keep))
    alive = x.square().sum(1) > 0
    live, at = alive.nonzero().flatten(), alive[keep].nonzero().flatten()
    if len(at):
        x = x / x.square().mean().sqrt()  # couplings see ratios alone
        found = _target(x[live], x[keep[at]], matching, target).plan()
        plan[live[:, None], at] = found.to(plan)
    return plan


def _target(x: Tensor, y: Tensor, matching: Matching, target: Target) -> Coupling:
    share: Marginals = "semi_relaxed" if target == "kmeans" else "uniform"
    moving = Matching(matching.cost, share)
    for _ in range(_ROUNDS if target != "topk" else 0):
        plan = moving.couple(x, y).plan()
        mass = plan.sum(0)[:, None]
        new = torch.where(mass > 0, plan.T @ x / mass.clamp_min(1e-300), y)
        # a mean of opposites is nothing, and has no direction to be compared by
        new = torch.where(new.square().sum(1, keepdim=True) > 0, new, y)
        still, y = torch.equal(new, y), new
        if still:
            break
    return matching.couple(x, y)


def maps(
    plan: Float[Tensor, "units kept"], keep: Int[Tensor, " kept"], *, published: bool = False
) -> tuple[Float[Tensor, "units kept"], Float[Tensor, "units kept"]]:
    """Turn masses into what each new unit is made of, and what each old one is read as.

    Args:
        plan: masses.
        keep: the units in whose place the new ones are: what takes nothing in stays as it was.
        published: both sides with rows of sum one, as in the paper's code.

    Returns:
        means over what joined each new unit (columns of sum one), and shares of each old unit
        (rows of sum one; zeros for what joined nothing and is not kept).
    """
    rows, columns = plan.sum(1, keepdim=True), plan.sum(0)
    into = plan / rows.clamp_min(1e-300)
    out = into if published else plan / columns.clamp_min(1e-300)
    own = torch.zeros_like(plan)
    own[keep, torch.arange(len(keep), device="cpu")] = 1.0
    out = torch.where(columns > 0, out, own)
    return out, torch.where(rows > 0, into, own)


def importance(x: Float[Tensor, "units features"]) -> Float[Tensor, " units"]:
    """Weigh units by the length of their features, with total 1; none weighs nothing.

    Args:
        x: features.

    Returns:
        weights of at least a thousandth of their mean.
    """
    size: Tensor = torch.linalg.vector_norm(x, dim=1)
    size = size.clamp_min(float(size.mean()) * 1e-3)
    return size / size.sum().clamp_min(1e-300)


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp_min(1e-300)
