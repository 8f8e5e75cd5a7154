"""Single swaps and dual bounds for facility location on a fixed number of units."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import reals, refuse

__all__ = ["improve", "lower_bound"]

WHOLE = (torch.int64, torch.int32)  # what indexes


def improve(
    cost: Float[Tensor, "units candidates"],
    null: Float[Tensor, " units"] | None,
    keep: Int[Tensor, " kept"],
    *,
    rounds: int,
) -> tuple[Int[Tensor, " kept"], float]:
    """Swap one kept unit for one outside while that lowers the cost.

    Args:
        cost: cost of moving unit i onto candidate j.
        null: cost of moving unit i onto nothing; None forbids it.
        keep: the set to start from, in any order.
        rounds: how many best swaps to take at most; each reads the whole cost once.

    Returns:
        the set in ascending order, and its cost.

    Source: FastPAM1 (Schubert & Rousseeuw 2021): all swaps of a round from the nearest and the
    second nearest, in one pass. Ours adds the null sink as a medoid that never leaves.
    """
    cost, null = _priced(cost, null, keep)
    keep = keep.sort().values
    for _ in range(rounds):
        change = _swap_changes(cost, null, keep)
        best = int(change.argmin())
        leave, enter = divmod(best, cost.shape[1])
        if float(change[leave, enter]) >= -1e-12 * float(null.sum()):
            break
        keep = torch.cat([keep[:leave], keep[leave + 1 :], keep.new_tensor([enter])]).sort().values
    value = float(_nearest(cost, null, keep)[1].sum())
    refuse(
        math.isnan(value),
        "a cost is not a number.",
        where="improve, arguments cost and null",
        fix="pass non-negative costs; forbid a single move with an infinite cost.",
    )
    return keep, value


def _priced(cost: Tensor, null: Tensor | None, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return costs and nulls in float64, and refuse a set that is none."""
    if not isinstance(keep, Tensor) or keep.ndim != 1 or keep.dtype not in WHOLE:
        kind = f"{keep.dtype}, {keep.ndim}-d" if isinstance(keep, Tensor) else type(keep).__name__
        raise TransportError(
            f"keep is no list of indices in a tensor, but {kind}.",
            where="argument keep",
            fix="pass indices of candidates, for example torch.tensor([0, 3]).",
        )
    cost = reals(cost, "cost")
    names = keep.tolist()
    refuse(
        cost.ndim != 2 or not all(cost.shape),
        f"a cost of shape {tuple(cost.shape)} moves nothing.",
        where="argument cost",
        fix="pass a matrix, units x candidates, with at least one of each.",
    )
    refuse(
        not names
        or len(set(names)) < len(names)
        or not 0 <= min(names) <= max(names) < cost.shape[1],
        f"{names} is no set of candidates.",
        where=f"argument keep, {cost.shape[1]} candidates",
        fix="pass indices of candidates, each once.",
    )
    cost = cost.double()
    return cost, cost.amax(dim=1) if null is None else reals(null, "null").to(cost)


def _nearest(cost: Tensor, null: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find each unit's nearest kept index (the last one is nothing), its cost, and the next."""
    served = torch.cat([cost[:, keep], null[:, None], null[:, None]], dim=1)
    two = served.topk(2, dim=1, largest=False, sorted=True)
    where = two.indices[:, 0].clamp(max=len(keep))
    return where, two.values[:, 0], two.values[:, 1]


def _swap_changes(cost: Tensor, null: Tensor, keep: Tensor) -> Tensor:
    """Return what each swap (kept leaves, candidate enters) adds to the cost."""
    where, first, second = _nearest(cost, null, keep)
    change = cost.new_zeros(len(keep) + 1, cost.shape[1])
    gain = cost.new_zeros(cost.shape[1])
    for part in torch.arange(len(cost), device=cost.device).split(2**23 // cost.shape[1] + 1):
        enter = torch.minimum(cost[part], first[part, None])
        gain += (enter - first[part, None]).sum(0)
        loss = torch.minimum(cost[part], second[part, None]).sub_(enter)
        change.index_add_(0, where[part], loss)
    change = change[:-1] + gain
    change[:, keep] = torch.inf
    return change


def lower_bound(
    cost: Float[Tensor, "units candidates"],
    null: Float[Tensor, " units"] | None,
    keep: Int[Tensor, " kept"],
    *,
    rounds: int,
) -> float:
    """Bound from below what any set of the same size costs.

    For prices v <= null, sum(v) - (the |keep| largest sums of (v_i - c_ij)+) is such a bound;
    subgradient steps raise the prices towards the best one.

    Args:
        cost: cost of moving unit i onto candidate j.
        null: cost of moving unit i onto nothing; None forbids it.
        keep: a good set, whose cost sets the length of the steps.
        rounds: number of steps.

    Returns:
        the best bound met, at least 0, in the unit of the cost.

    Source: Cornuejols, Fisher & Nemhauser 1977; steps after Held, Wolfe & Crowder 1974.
    """
    cost, null = _priced(cost, null, keep)
    target = float(_nearest(cost, null, keep)[1].sum())
    price = _nearest(cost, null, keep)[2].clone()
    best, relax, since = 0.0, 1.0, 0
    for _ in range(rounds):
        value, slope = _dual(cost, price, len(keep))
        since = 0 if value > best else since + 1
        best = max(best, value)
        norm = float(slope.square().sum())
        if norm == 0 or target - best <= 1e-12 * target:
            break
        if since == 5:
            relax, since = relax / 2, 0
        price = torch.minimum(price + relax * (target - value) / norm * slope, null).clamp_(min=0)
    return min(best, target)


def _dual(cost: Tensor, price: Tensor, size: int) -> tuple[float, Tensor]:
    """Return the dual value and one of its ascent directions."""
    saved = torch.cat([(price[:, None] - c).clamp_(min=0).sum(0) for c in cost.split(2048, dim=1)])
    top = saved.topk(size)
    used = (cost[:, top.indices] < price[:, None]).sum(1)
    return float(price.sum() - top.values.sum()), (1 - used).to(price)
