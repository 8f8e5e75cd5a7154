"""Least squares on a support: every output has weights of its own that may not change from 0."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["damped", "off", "refit", "towards"]

_Weight = Float[Tensor, "groups out columns"]
_Second = Float[Tensor, "groups columns columns"]


def damped(second: _Second, damping: float) -> tuple[_Second, Bool[Tensor, "groups columns"]]:
    """Lift moments so that they can be inverted.

    Args:
        second: symmetric; not written.
        damping: share of the mean diagonal that is added.

    Returns:
        lifted moments, and the columns that never vary: what they weigh does not show. There,
        the diagonal is 1.
    """
    diagonal = second.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 1e-12 * diagonal.amax(1, keepdim=True).clamp_min(1e-300)
    lifted = second.masked_fill(dead[:, :, None] | dead[:, None, :], 0.0)
    alive = (~dead).sum(1).clamp_min(1)
    lift = damping * diagonal.masked_fill(dead, 0.0).sum(1) / alive
    added = torch.where(dead, 1.0, lift[:, None])
    return lifted + torch.diag_embed(added), dead


def off(weight: _Weight, aim: _Weight, second: _Second) -> Float[Tensor, " groups"]:
    """Measure how far a weight's answers are from another's: summed squares over outputs."""
    gap = weight - aim
    return ((gap @ second) * gap).sum((1, 2))


def towards(
    mask: Bool[Tensor, "groups out columns"], aim: _Weight, second: _Second, damping: float
) -> _Weight:
    """Refit the weights of a mask to the answers of a dense weight.

    Args:
        mask: weights that may differ from zero.
        aim: the dense weight.
        second: averaged products of what the layer reads.
        damping: share of the mean diagonal that is added, which pulls towards `aim`.

    Returns:
        the weights; 0 on inputs that never vary.
    """
    lifted, dead = damped(second, damping)
    keep = mask & ~dead[:, None, :]
    return refit(keep, lifted, aim.masked_fill(dead[:, None, :], 0.0) @ lifted, aim)


def refit(
    mask: Bool[Tensor, "groups out columns"],
    second: _Second,
    cross: _Weight,
    start: _Weight,
    *,
    steps: int = 200,
    tolerance: float = 1e-10,
) -> _Weight:
    """Minimise `w H w' - 2 w c'` for every output over the weights of its mask.

    Conjugate gradients on all outputs at once, each with its own steps; preconditioned by the
    diagonal.

    Args:
        mask: weights that may differ from zero.
        second: H, positive definite.
        cross: c, one row per output.
        start: first guess; what lies off the mask is set to zero.
        steps: at most.
        tolerance: relative size of the residual at which to stop.

    Returns:
        the weights, exact zeros off the mask.
    """
    keep = mask.to(second.dtype)
    weight = start * keep
    scale = keep / second.diagonal(dim1=1, dim2=2).clamp_min(1e-300)[:, None, :]
    residual = (cross - weight @ second) * keep
    ahead = residual * scale
    moved, size = ahead.clone(), (residual * ahead).sum(2, keepdim=True)
    goal = tolerance**2 * ((cross * keep).square() * scale).sum(2, keepdim=True)
    for _ in range(steps):
        if bool((size <= goal).all()):
            break
        through = (moved @ second) * keep
        step = _ratio(size, (moved * through).sum(2, keepdim=True))
        weight = weight + step * moved
        residual = residual - step * through
        ahead = residual * scale
        new = (residual * ahead).sum(2, keepdim=True)
        moved, size = ahead + _ratio(new, size) * moved, new
    return weight


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp_min(1e-300), 0.0)
