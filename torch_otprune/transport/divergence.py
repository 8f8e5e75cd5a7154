"""The debiased Sinkhorn divergence, with geomloss behind its only door."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import (
    cloud,
    clouds,
    masses,
    order_of,
    positive,
    refuse,
    same_space,
)
from torch_otprune.transport.cost import root
from torch_otprune.transport.couple import REFUSE
from torch_otprune.transport.dispatch import STORED, Choice, Problem, choose
from torch_otprune.transport.geometry import Cloud, Geometry, Stored, softmin
from torch_otprune.transport.keops import LOCK, available, import_keops, softmin_keops
from torch_otprune.transport.layers import debiased, small
from torch_otprune.transport.reduce import principal
from torch_otprune.transport.sinkhorn import log_domain, scaling

__all__ = ["Divergence", "divergence", "divergence_report"]


@dataclass(frozen=True, eq=False)
class Divergence:
    """A distance and how it came about; of stacked layers, what is worst among them.

    Args:
        distance: in the unit of the points; differentiable in points and weights.
        solver: who found it.
        why: the reason for that choice.
        eps: temperature in the unit of the points to the power p; 0 where the distance is exact.
        marginal_error: of the cross term, as a share of the mass.
        left_out: share of the pooled variance that a reduction of dimension dropped.
    """

    distance: Float[Tensor, "*batch"]
    solver: str
    why: str
    eps: float
    marginal_error: float
    left_out: float


@overload
def divergence(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch m d"],
    a: Float[Tensor, "*#batch n"] | None = None,
    b: Float[Tensor, "*#batch m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: Literal[False] = False,
) -> Float[Tensor, "*batch"]: ...


@overload
def divergence(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch m d"],
    a: Float[Tensor, "*#batch n"] | None = None,
    b: Float[Tensor, "*#batch m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: Literal[True],
) -> Divergence: ...


def divergence(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch m d"],
    a: Float[Tensor, "*#batch n"] | None = None,
    b: Float[Tensor, "*#batch m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    explain: bool = False,
) -> Float[Tensor, "*batch"] | Divergence:
    """Measure a debiased entropic W_p between two clouds, smooth enough to train with.

    Args:
        x: points of one measure; layers of one shape may be stacked in front.
        y: points of the other, in the same space.
        a: weights of x, scaled to total 1, per layer or for all; None is uniform.
        b: weights of y, likewise.
        p: order of the distance.
        eps: temperature relative to the mean cost between the clouds.
        solver: `scaling`, `geomloss` (also called `keops`), `blocks` or `auto`.
        explain: return a `Divergence`, with all lines that were passed over in its `why`.

    Returns:
        the distance in the unit of the points, one per layer, zero for equal measures;
        differentiable.

    Source: Feydy et al. 2019, by way of geomloss, whose own values are W_p^p / p. Gradients are
    those of frozen potentials (Danskin), not of the iteration.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(float(divergence(x, x + 3.0)), 3)
        3.0
    """
    if x.ndim <= 2:
        found = divergence_report(x, y, a, b, p=p, eps=eps, solver=solver, explain=explain)
        return found if explain else found.distance
    (x, y), p = clouds(x, y), order_of(p)
    positive(eps, "eps")
    *batch, n, d = x.shape
    m = y.shape[-2]
    a, b = masses(a, x, n, "a").reshape(-1, n), masses(b, y, m, "b").reshape(-1, m)
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    x, y = x.reshape(-1, n, d), y.reshape(-1, m, d)
    found = _stacked(x, y, a, b, p=p, eps=eps, solver=solver, explain=explain)
    found = replace(found, distance=found.distance.reshape(batch))
    return found if explain else found.distance


def _stacked(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: float, eps: float, solver: str, explain: bool
) -> Divergence:
    """Measure every pair of a batch: together where they are small, else one by one."""
    choice = _choice(x[0], y[0], p, solver)
    together = choice.solver == "scaling" and small(x, y)
    found = debiased(x, y, a, b, p=p, eps=eps) if together else None
    if found is not None:
        distance, heat, error = found
        if solver == "auto":
            choice = replace(choice, why=f"{len(x)} small pairs of clouds share every product")
        why, worst = choice.told(explain), (float(heat.max()), float(error.max()))
        return Divergence(distance, choice.solver, why, *worst, left_out=0.0)
    each = [
        divergence_report(*one, p=p, eps=eps, solver=solver, explain=explain)
        for one in zip(x, y, a, b, strict=True)
    ]
    return replace(
        each[0],
        distance=torch.stack([one.distance for one in each]),
        eps=max(one.eps for one in each),
        marginal_error=max(one.marginal_error for one in each),
        left_out=max(one.left_out for one in each),
    )


def divergence_report(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
    eps: float = 0.02,
    solver: str = "auto",
    dims: int | None = None,
    explain: bool = False,
) -> Divergence:
    """Measure as `divergence` does, and say how.

    Args:
        x: points of one measure.
        y: points of the other.
        a: weights of x.
        b: weights of y.
        p: order of the distance.
        eps: temperature relative to the mean cost.
        solver: as in `divergence`.
        dims: principal directions to keep; None keeps 64 where costs do not fit in memory.
        explain: put all lines that were passed over into `why`.

    Returns:
        the distance with solver, reason, temperature, marginal error and variance left out.
    """
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    y = y.to(x)
    a, b = masses(a, x[:0, :0], len(x), "a"), masses(b, y[:0, :0], len(y), "b")
    a, b = a / a.sum(), b / b.sum()
    positive(eps, "eps")
    x, y, left_out = principal(x, y, dims)
    choice = _choice(x, y, p, solver)
    why = choice.told(explain)
    heat = eps * Cloud(x.detach(), y.detach(), p).mean()
    if heat == 0:  # all mass in one point, twice: nothing to move
        return Divergence(0 * (x.sum() + y.sum()), choice.solver, why, 0.0, 0.0, left_out)
    value, error = _value(x, y, a, b, p=p, eps=heat, solver=choice.solver)
    distance = root(value.clamp(min=0), p)
    return Divergence(distance, choice.solver, why, heat, error, left_out)


def _choice(x: Tensor, y: Tensor, p: float, solver: str) -> Choice:
    live = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    problem = Problem(
        len(x),
        len(y),
        x.shape[1],
        x.device.type,
        "gradient" if live else "value",
        entropic=True,
        keops=available if p in (1, 2) else lambda: False,
    )
    return choose(problem, solver, where="divergence, argument solver")


def _value(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: float, eps: float, solver: str
) -> tuple[Tensor, float]:
    """Return W_p^p, live in x, y, a and b, and the marginal error of the cross term."""
    xs, ys, wa, wb = x.detach(), y.detach(), a.detach(), b.detach()
    with torch.no_grad():
        f, g, error = _cross(xs, ys, wa, wb, p=p, eps=eps, solver=solver)
        own_x = _self(xs, wa, p=p, eps=eps, solver=solver)
        own_y = _self(ys, wb, p=p, eps=eps, solver=solver)
    refuse(
        not error <= REFUSE,
        f"the potentials put {error:.1%} of the mass in the wrong place.",
        where=f"divergence, solver {solver}, {len(x)} x {len(y)}",
        fix="raise eps.",
    )
    if not (torch.is_grad_enabled() and any(part.requires_grad for part in (x, y, a, b))):
        return (a * (f - own_x)).sum() + (b * (g - own_y)).sum(), error
    unit = (eps, p)
    left = _live(x, ys, wb, g, unit=unit) - _live(x, xs, wa, own_x, unit=unit)
    right = _live(y, xs, wa, f, unit=unit) - _live(y, ys, wb, own_y, unit=unit)
    return (a * left).sum() + (b * right).sum(), error


def _cross(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: float, eps: float, solver: str
) -> tuple[Tensor, Tensor, float]:
    there = _geometry(x, y, p, solver)
    back = there.transposed()
    if isinstance(there, Stored):
        heat = x.new_tensor([eps])
        found = scaling(there.cost[None], a[None], b[None], heat, tol=1e-4)
        if found is not None and float(found.error) <= 1e-3:
            return found.f[0], found.g[0], float(found.error)
    start, first = 50 * eps, None
    if solver == "geomloss":
        start, first = eps, _geomloss_potentials(x, y, a, b, p=p, eps=eps)
    result = log_domain(
        lambda h, e: _softmin(there, h, e, solver),
        lambda h, e: _softmin(back, h, e, solver),
        a,
        b,
        eps,
        start=start,
        first=first,
        limit=500,
    )
    return result.f, result.g, float(result.error)


def _self(x: Tensor, a: Tensor, *, p: float, eps: float, solver: str) -> Tensor:
    """Couple a measure with itself: one potential, averaged steps, a handful of them."""
    geometry, log_a = _geometry(x, x, p, solver), a.log()
    own = _softmin(geometry, log_a, eps, solver) / 2
    if isinstance(geometry, Stored):
        found = _self_scaled(geometry.cost, a, own, eps)
        if bool(found.isfinite().all()):
            return found
    for _ in range(100):
        new = (own + _softmin(geometry, log_a + own / eps, eps, solver)) / 2
        # The plan's rows are off by twice the step, over eps.
        error = 2 * (a * (new - own).abs()).sum() / eps
        own = new
        if float(error) <= 1e-4:
            break
    return own


def _self_scaled(cost: Tensor, a: Tensor, own: Tensor, eps: float) -> Tensor:
    """Take the same steps by matrix products, on a kernel around the first guess."""
    kernel = torch.sub(own[:, None], cost).add_(own).div_(eps).exp_()
    u = torch.ones_like(a)
    for _ in range(100):
        rows = kernel @ (a * u)
        error = (a * (u * rows - 1).abs()).sum()
        u = (u / rows).sqrt()
        if not float(error) > 1e-4:
            break
    return own + eps * u.log()


def _geometry(x: Tensor, y: Tensor, p: float, solver: str) -> Geometry:
    there = Cloud(x, y, p)
    return Stored(there.block(slice(None))) if solver == "scaling" else there


def _softmin(geometry: Geometry, h: Tensor, eps: float, solver: str) -> Tensor:
    if solver == "geomloss" and isinstance(geometry, Cloud) and _online(geometry.x, geometry.y):
        return softmin_keops(geometry.x, geometry.y, h, eps, geometry.p)
    return softmin(geometry, h, eps)


def _online(x: Tensor, y: Tensor) -> bool:
    return len(x) * len(y) > STORED and available()


def _geomloss_potentials(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Ask geomloss for a first guess; its potentials fit no plan before they are polished."""
    # Its cost is |x - y|^p / p and its eps is blur^p, so both differ from ours by p.
    refuse(
        p not in {1.0, 2.0},
        f"geomloss knows p=1 and p=2, not {p:g}.",
        where="divergence, argument solver",
        fix="use solver='auto'.",
    )
    backend = "online" if _online(x, y) else "tensorized"
    scale = max(float((x.amax(0) - x.amin(0)).norm()), float((y.amax(0) - y.amin(0)).norm()), 1e-30)
    diameter = scale + float((x.mean(0) - y.mean(0)).norm())
    with LOCK, contextlib.redirect_stdout(io.StringIO()), _grad_mode_kept():
        loss = _geomloss().SamplesLoss(
            "sinkhorn", p=int(p), blur=(eps / p) ** (1 / p), diameter=diameter,
            scaling=0.7, debias=False, potentials=True, backend=backend,
        )  # fmt: skip
        f, g = loss(a.contiguous(), x.contiguous(), b.contiguous(), y.contiguous())
    return p * f.reshape(-1), p * g.reshape(-1)


@contextlib.contextmanager
def _grad_mode_kept() -> Any:
    """Put grad mode back: geomloss 0.3.1 leaves it on."""
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


def _geomloss() -> Any:
    import_keops()  # first, so that it is quiet and uses our cache
    import geomloss

    return geomloss


class _LiveSoftmin(torch.autograd.Function):
    """Soft minimum that moves with its first cloud; the backward pass recomputes the plan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, h: Tensor, unit: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x, y, h)
        ctx.eps, ctx.p = unit
        return softmin(Cloud(x, y, ctx.p), h, ctx.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        x, y, h = ctx.saved_tensors
        slopes = []
        for rows, cost in Cloud(x, y, ctx.p).blocks():
            plan = torch.softmax(h - cost / ctx.eps, dim=1)
            if ctx.p != 2:  # the cost |x - y|^p has slope p |x - y|^(p - 2) (x - y), 0 at 0
                slope = cost.where(cost > 0, cost.new_ones(())).pow(1 - 2 / ctx.p)
                plan = plan * slope.where(cost > 0, cost.new_zeros(()))
            slopes.append(ctx.p * (plan.sum(1, keepdim=True) * x[rows] - plan @ y))
        return grads[0][:, None] * torch.cat(slopes), None, None, None


def _live(x: Tensor, y: Tensor, b: Tensor, g: Tensor, *, unit: tuple[float, float]) -> Tensor:
    out: Tensor = _LiveSoftmin.apply(x, y, b.log() + g / unit[0], unit)  # type: ignore[no-untyped-call]
    return out
