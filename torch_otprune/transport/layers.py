"""The divergence of many small pairs of clouds at once: every product serves all of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.cost import MANY, ground_cost, root
from torch_otprune.transport.sinkhorn import scaling

__all__ = ["debiased", "small"]

# Points, weights and potentials of both sides of a plan, and its sign in the divergence.
_Side = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]


def small(x: Float[Tensor, "batch n d"], y: Float[Tensor, "batch m d"]) -> bool:
    """Say whether pairs are so small that one by one they would mostly wait for each other."""
    return max(x.shape[1], y.shape[1]) ** 2 <= MANY


def debiased(
    x: Float[Tensor, "batch n d"],
    y: Float[Tensor, "batch m d"],
    a: Float[Tensor, "batch n"],
    b: Float[Tensor, "batch m"],
    *,
    p: float,
    eps: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]] | None:
    """Measure the debiased entropic W_p of every pair.

    Args:
        x: points of one measure per pair, checked.
        y: points of the other.
        a: weights of x, of total 1.
        b: weights of y, of total 1.
        p: order of the distance.
        eps: temperature relative to the mean cost of each pair.

    Returns:
        one distance per pair, differentiable, its temperature and its marginal error; None where a
        kernel underflowed, so that each pair has to be solved on its own.
    """
    xs, ys, wa, wb = x.detach(), y.detach(), a.detach(), b.detach()
    with torch.no_grad():
        costs = [ground_cost(s, t, p=p) for s, t in ((xs, ys), (xs, xs), (ys, ys))]
        heat = eps * costs[0].mean((1, 2))
        still = heat == 0  # all mass in one point, twice: nothing to move
        heat = heat.masked_fill(still, 1.0)
        found = scaling(costs[0], wa, wb, heat, tol=1e-4)
        own_x, own_y = _own(costs[1], wa, heat), _own(costs[2], wb, heat)
    if found is None or not _sound(found.error, own_x, own_y):
        return None
    value = (a * (found.f - own_x)).sum(1) + (b * (found.g - own_y)).sum(1)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        sides: tuple[_Side, ...] = (
            (x, y, wa, wb, found.f, found.g, 1.0),
            (x, x, wa, wa, own_x, own_x, -0.5),
            (y, y, wb, wb, own_y, own_y, -0.5),
        )
        for cost, side in zip(costs, sides, strict=True):
            value = value + _moving(cost, side, heat, p)
    distance = root(value.clamp(min=0).masked_fill(still, 0.0), p)
    return distance, heat.masked_fill(still, 0.0), found.error


def _moving(cost: Tensor, side: _Side, heat: Tensor, p: float) -> Tensor:
    """Give zeros whose derivative in the points is that of the frozen plan's cost (Danskin)."""
    x, y, a, b, f, g, sign = side
    power = (f[:, :, None] + g[:, None, :] - cost) / heat[:, None, None]
    plan = a[:, :, None] * b[:, None, :] * power.exp()
    total = sign * (plan * ground_cost(x, y, p=p)).sum((1, 2))
    return total - total.detach()


def _sound(error: Tensor, *own: Tensor) -> bool:
    return bool((error <= 1e-3).all()) and all(bool(part.isfinite().all()) for part in own)


def _own(cost: Tensor, a: Tensor, eps: Tensor) -> Tensor:
    """Couple every measure with itself: one potential each, averaged steps by matrix products."""
    e = eps[:, None, None]
    own = -eps[:, None] * torch.logsumexp(a.log()[:, None, :] - cost / e, dim=2) / 2
    kernel = ((own[:, :, None] + own[:, None, :] - cost) / e).exp_()
    u = torch.ones_like(a)
    for _ in range(100):
        rows = torch.bmm(kernel, (a * u)[:, :, None])[:, :, 0]
        error = (a * (u * rows - 1).abs()).sum(1)
        u = (u / rows).sqrt()
        if not bool((error > 1e-4).any()):
            break
    return own + eps[:, None] * u.log()
