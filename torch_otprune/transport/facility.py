"""Facility location: the best few atoms to move a whole measure onto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import number, reals
from torch_otprune.transport.swaps import improve, lower_bound

__all__ = ["FacilityLocation", "facility_location"]

BLOCK = 64  # candidates re-evaluated at a time; larger wastes work, smaller wastes calls


@dataclass(frozen=True)
class FacilityLocation:
    """Nested sets that stand in for all units, and what each set costs.

    Args:
        order: unit indices, the most useful first; the first k of them are the set of size k.
        curve: `curve[k]` is the cost once the first k are kept, in the unit of the cost, on the
            CPU.
        bound: `bound[k]` is what no set of size k can go below, on the CPU.
        improved: sets that swaps made better than the nested one, by size.
    """

    order: Int[Tensor, " picked"]
    curve: Float[Tensor, " sizes"]
    bound: Float[Tensor, " sizes"]
    improved: dict[int, Int[Tensor, " _k"]] = field(default_factory=dict)

    def keep(self, size: int) -> Int[Tensor, " size"]:
        """List the kept set of one size in ascending order, after swaps where there were any."""
        self._known(size)
        return self.improved.get(size, self.order[:size]).sort().values

    def gap(self, size: int) -> float:
        """Bound how far the set of this size is from the best one, as a fraction of its cost.

        Returns:
            0 means proven optimal; 0.1 means that at most 10 % can be gained. Loose unless the
            size was given `duals`.
        """
        self._known(size)
        value, bound = float(self.curve[size]), float(self.bound[size])
        return 0.0 if value <= 0 else min(1.0, max(0.0, (value - bound) / value))

    def _known(self, size: int) -> None:
        if 0 <= size <= len(self.order):
            return
        raise TransportError(
            f"a set of {size} was not looked for: there are sets of 0 to {len(self.order)}.",
            where="FacilityLocation, argument size",
            fix="ask facility_location for larger sizes.",
        )


def facility_location(
    cost: Float[Tensor, "units candidates"],
    null: Float[Tensor, " units"] | None = None,
    *,
    sizes: int | Sequence[int] | None = None,
    swaps: int = 0,
    duals: int = 0,
) -> FacilityLocation:
    """Choose nested sets S that minimise the cost of moving every unit onto its nearest in S.

    The objective is the sum over units i of min over j in S, or nothing, of `cost[i, j]`: optimal
    transport with a free second marginal supported on |S| atoms.

    Args:
        cost: cost of moving unit i onto candidate j, non-negative; infinity forbids the move.
        null: cost of moving unit i onto nothing; None forbids it, and then `curve[0]` is the
            convention that every unit goes to the worst candidate.
        sizes: where to spend swaps, and how far to go: greedy stops at the largest.
        swaps: rounds of best single swaps for each of `sizes`.
        duals: steps of dual ascent that tighten the bound of each of `sizes`.

    Returns:
        order and improved sets, on the device of `cost`; cost curve and lower bounds, on the CPU,
        where an entry is read without waiting for a device.

    Raises:
        TransportError: if a cost is negative or not a number, or a size is out of range.

    Source: Nemhauser, Wolsey & Fisher 1978 for the guarantee (the greedy saving is at least 63 %
    of the best); Minoux 1978 for the lazy evaluation; Cornuejols, Fisher & Nemhauser 1977 for
    the bounds.

    Example:
        >>> x = torch.tensor([0.0, 0.1, 5.0])
        >>> facility_location((x[:, None] - x).abs(), x.abs()).order
        tensor([2, 1, 0])
    """
    cost, null = _checked(cost, null)
    wanted = _sizes(sizes, cost.shape[1])
    order, curve, bound = _greedy(cost, null, max(wanted) if wanted else cost.shape[1])
    improved = {}
    for size in wanted:
        keep, value = improve(cost, null, order[:size], rounds=swaps)
        if value < float(curve[size]) - 1e-12 * float(curve[0]):
            curve[size], improved[size] = value, keep
        if duals:
            tight = lower_bound(cost, null, keep, rounds=duals)
            bound[size] = min(max(float(bound[size]), tight), value)
    # What more units cannot go below, fewer cannot either.
    bound = bound.flip(0).cummax(0).values.flip(0)
    return FacilityLocation(order, curve, bound, improved)


def _checked(cost: Tensor, null: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both in float64, tiny negatives from rounding set to zero."""
    cost = reals(cost, "cost").detach().double()
    if cost.ndim != 2 or not all(cost.shape):
        raise TransportError(
            f"a cost of shape {tuple(cost.shape)} moves nothing.",
            where="facility_location, argument cost",
            fix="pass a matrix, units x candidates, with at least one of each.",
        )
    null = cost.amax(dim=1) if null is None else reals(null, "null").detach().to(cost)
    _refuse(
        null.shape != cost.shape[:1], f"null of shape {tuple(null.shape)} has no entry per unit"
    )
    _refuse(cost.isnan().any() or null.isnan().any(), "a cost is not a number")
    _refuse(null.isinf().any(), "the cost of moving to nothing is infinite")
    scale = float(null.max())
    _refuse(min(float(cost.min()), float(null.min())) < -1e-6 * scale, "a cost is negative")
    return cost.clamp(min=0), null.clamp(min=0)


def _refuse(wrong: Tensor | bool, problem: str) -> None:
    if wrong:
        raise TransportError(
            f"{problem}.",
            where="facility_location, arguments cost and null",
            fix="pass finite, non-negative costs; forbid a single move with an infinite cost.",
        )


def _sizes(sizes: int | Sequence[int] | None, most: int) -> tuple[int, ...]:
    wanted = () if sizes is None else (sizes,) if isinstance(sizes, int) else tuple(sizes)
    wrong = [k for k in wanted if not number(k) or not 1 <= k <= most or k != int(k)]
    if wrong:
        raise TransportError(
            f"a set of {wrong[0]!r} is asked of {most} candidates.",
            where="facility_location, argument sizes",
            fix=f"ask for sizes from 1 to {most}.",
        )
    return wanted


def _greedy(cost: Tensor, null: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add the candidate that saves most, `steps` times."""
    state = _Gains(cost, null)
    order, curve = [], [float(null.sum())]
    # Like what `lower_bound` returns, on the CPU whatever the default device is.
    bound = torch.full((steps + 1,), -torch.inf, dtype=cost.dtype, device="cpu")
    checkpoint = 0
    for step in range(steps):
        if step == checkpoint:
            torch.maximum(bound, state.lower_bound(steps), out=bound)
            checkpoint = max(step + 1, int(step * 1.2))
        order.append(state.take())
        curve.append(state.value())
    values = torch.tensor(curve, dtype=cost.dtype, device="cpu")
    torch.maximum(bound, state.lower_bound(steps), out=bound)
    # A bound above the value it bounds can only be rounding.
    bound = torch.minimum(bound.clamp(min=0), values)
    return torch.tensor(order, device=cost.device), values, bound


class _Gains:
    """Upper bounds on what each candidate still saves, exact where `fresh`.

    Savings only shrink as the set grows, so a stale value is an upper bound, and taking the exact
    loss of a step off a stale value leaves an upper bound.
    """

    def __init__(self, cost: Tensor, null: Tensor) -> None:
        self.cost, self.columns = cost, cost.T.contiguous()
        self.nearest = null.clone()
        self.gain = self._exact(torch.arange(cost.shape[1], device=cost.device))
        self.fresh = torch.ones_like(self.gain, dtype=torch.bool)
        self.tie = 1e-12 * float(null.sum())
        self.stale = False

    def value(self) -> float:
        return float(self.nearest.sum())

    def take(self) -> int:
        """Move the best candidate into the set."""
        best = self._best()
        new = torch.minimum(self.nearest, self.columns[best])
        rows = (new < self.nearest).nonzero().squeeze(1)
        # Few rows move once the set has some size: their share of the gains is updated exactly.
        if 8 * len(rows) <= len(new):
            self._forget(rows, new)
        else:
            # What was taken stays out: made anew it would save nothing, like any dead candidate.
            self.fresh = self.gain.isneginf()
            self.stale = True
        self.nearest = new
        self.gain[best] = -torch.inf
        self.fresh[best] = True
        return best

    def lower_bound(self, steps: int) -> Tensor:
        """Bound every set size from here: no k candidates save more than the k best do alone."""
        saved = self.gain.clamp(min=0).sort(descending=True).values[:steps].cumsum(0).cpu()
        return self.value() - torch.cat([saved.new_zeros(1), saved])

    def _best(self) -> int:
        while self.stale:
            top = self.gain.topk(min(BLOCK, len(self.gain))).indices
            again = top[~self.fresh[top]]
            known = self.gain.where(self.fresh, self.gain.new_tensor(-torch.inf)).max()
            if not len(again) or known > self.gain[again].max():
                break
            self.gain[again] = self._exact(again)
            self.fresh[again] = True
        # Rounding must not decide: among equals the lowest index wins.
        return int((self.gain >= self.gain.max() - self.tie).nonzero()[0])

    def _exact(self, candidates: Tensor) -> Tensor:
        parts = candidates.split(max(1, 2**24 // len(self.nearest)))
        return torch.cat(
            [(self.nearest - self.columns[part]).clamp_(min=0).sum(1) for part in parts]
        )

    def _forget(self, rows: Tensor, new: Tensor) -> None:
        """Take off every gain what it had from rows that are better served now."""
        for part in rows.split(max(1, 2**24 // len(self.gain))):
            cost = self.cost[part]
            before = (self.nearest[part, None] - cost).clamp_(min=0)
            self.gain -= before.sub_((new[part, None] - cost).clamp_(min=0)).sum(0)
