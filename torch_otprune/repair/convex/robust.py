"""A rectified pair against inputs that may move by a radius per channel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.repair.convex.loss import Loss
from torch_otprune.repair.convex.program import Pair, Program

__all__ = ["robust_objective", "stable", "toughen", "worst"]

_TURNS = 25  # steps on one convex program before its patterns are read anew
_RATE = 0.03  # of the typical length of a unit, Adam's first step


def stable(pair: Pair, x: Tensor, radii: Float[Tensor, " columns"]) -> float:
    """Tell the share of units and rows at which no move within the radii crosses a kink."""
    live = pair.units.norm(dim=0) > 0
    if not bool(live.any()):
        return 1.0
    units = pair.units[:, live]
    return float(((x @ units).abs() >= radii @ units.abs()).double().mean())


def robust_objective(program: Program, pair: Pair, radii: Float[Tensor, " columns"]) -> float:
    """Bound the mean loss over all moves within the radii, by intervals; add the penalty.

    Args:
        program: whose rows, loss and penalty count; its patterns do not.
        pair: a rectified pair.
        radii: most that each column may move by, one for all rows; 0 for the column of ones.

    Returns:
        a number in the unit of the loss.
    """
    return float(_bound(program, pair, radii, on=None))


def toughen(
    program: Program, pair: Pair, radii: Float[Tensor, " columns"], *, steps: int
) -> tuple[Pair, float]:
    """Lower the robust objective by a sequence of convex programs.

    A unit's lower bound is `max(0, z - r)`, with r how far the radii move it. In it, and in it
    alone, convexity fails where more of a unit would help; so there it is replaced by `z - r` where
    that is positive now, and by 0 elsewhere. This bounds the loss from above, touches it at
    the present pair, and is convex in all units. Some steps lower it; then the bound is moved.

    Args:
        program: whose rows, loss and penalty count.
        pair: where to start; its output directions stay.
        radii: as for `robust_objective`.
        steps: of Adam, all programs together.

    Returns:
        the best pair met, and its robust objective; never above the first.

    Source: the worst case by linear pieces is that of Bai et al. 2021; moving pieces in place of
    cones, so that units need not be stable on every row, is ours.
    """
    best = robust_objective(program, pair, radii), pair
    with torch.enable_grad():
        units = pair.units.clone().requires_grad_(True)
        offset = pair.offset.clone().requires_grad_(True)
        rate = _RATE * float(pair.units.norm(dim=0).mean()) / len(pair.units) ** 0.5
        adam = torch.optim.Adam([units, offset], lr=max(rate, 1e-9))
        course = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        on = None
        for step in range(steps):
            if step % _TURNS == 0:
                on = (program.x @ units - radii @ units.abs() > 0).detach()
            adam.zero_grad()
            torch.autograd.backward(_bound(program, Pair(units, pair.ways, offset), radii, on=on))
            adam.step()
            course.step()
            if (step + 1) % _TURNS == 0 or step + 1 == steps:
                now = Pair(units.detach().clone(), pair.ways, offset.detach().clone())
                best = min(
                    best, (robust_objective(program, now, radii), now), key=lambda found: found[0]
                )
    return best[1], best[0]


def _bound(program: Program, pair: Pair, radii: Tensor, *, on: Tensor | None) -> Tensor:
    seen, moved = program.x @ pair.units, radii @ pair.units.abs()
    high, low = (seen + moved).relu(), seen - moved
    low = low.relu() if on is None else low * on
    mean = worst(program.loss, pair, program.target, high, low).mean()
    lengths = (pair.units.square().sum(0) + 1e-24).sqrt().sum()
    return mean + program.penalty * (lengths + (pair.offset.square().sum() + 1e-24).sqrt())


def worst(loss: Loss, pair: Pair, target: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Bound every row's loss by intervals of the units.

    Args:
        loss: of one row.
        pair: whose directions and offset count.
        target: answers or one-hot labels.
        high: rows x units, upper bounds behind the rectifier.
        low: lower ones.

    Returns:
        one number per row.
    """
    if not loss.labelled:
        up, down = pair.ways.clamp_min(0), pair.ways.clamp_max(0)
        top = high @ up + low @ down + pair.offset
        return loss.worst(top, low @ up + high @ down + pair.offset, target)
    label, parts, order = target.argmax(1), list[Tensor](), list[Tensor]()
    for own in range(target.shape[1]):
        rows = (label == own).nonzero()[:, 0]
        ahead = pair.ways - pair.ways[:, own, None]  # of each answer before the label's
        lead = high[rows] @ ahead.clamp_min(0) + low[rows] @ ahead.clamp_max(0)
        lead = lead + pair.offset - pair.offset[own]
        parts.append(loss.worst(lead, lead, target[rows]))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]
