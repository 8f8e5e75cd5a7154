"""Sums with known weights: layers, scales, differences, means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_otprune.certify.facts import UNBOUNDED, Facts, saturated

__all__ = ["plus", "scaled", "weighted", "widened"]

Bilinear = Callable[[Tensor, Tensor], Tensor]


def weighted(f: Facts, weight: Tensor, apply: Bilinear, inputs: int) -> Facts:
    """Carry facts through a map that is linear, with known weights.

    Args:
        f: of what is mapped.
        weight: its values.
        apply: the map, linear in both arguments.
        inputs: number of inputs that slopes are kept for.

    Returns:
        the facts of the result, before any bias.
    """
    up, down = weight.double().clamp_min(0), (-weight.double()).clamp_min(0)
    # as marks, or the products of small weights would vanish
    some, less = (up > 0).double(), (down > 0).double()

    def free(bad: Tensor, other: Tensor) -> Tensor:
        return (apply(bad.double(), some) + apply(other.double(), less)) == 0

    lo, hi = f.slopes(inputs)
    with_up, with_down = (lambda t: apply(t, up)), (lambda t: apply(t, down))
    low = torch.vmap(with_up)(lo) - torch.vmap(with_down)(hi)
    high = torch.vmap(with_up)(hi) - torch.vmap(with_down)(lo)
    every = torch.ones_like(f.cvx)
    zero = free(~f.flat, ~f.flat)
    return Facts(
        free(~f.cvx, ~f.ccv),
        free(~f.ccv, ~f.cvx),
        free(~f.pos, every),
        free(~f.lcx, every),
        zero,
        *saturated(low, high),
    )


def scaled(f: Facts, by: Facts, value: Tensor | None, inputs: int) -> Facts:
    """Carry facts through a product with what does not depend on the input.

    Args:
        f: of one factor.
        by: of the other, which is flat.
        value: its value where it is that of every call.
        inputs: number of inputs that slopes are kept for.

    Returns:
        the facts of the product.
    """
    shape = torch.broadcast_shapes(f.cvx.shape, by.cvx.shape)
    f, by = widened(f, shape), widened(by, shape)
    up = by.pos if value is None else (value >= 0).expand(shape)
    down = torch.zeros_like(up) if value is None else (value <= 0).expand(shape)
    lo, hi = f.slopes(inputs)
    size = (
        torch.full(shape, UNBOUNDED, dtype=torch.float64) if value is None else value.double().abs()
    )
    ends = [torch.where(t == 0, torch.zeros_like(t), t * size.to(t)) for t in (lo, hi)]
    low = torch.where(up, ends[0], torch.where(down, -ends[1], torch.minimum(ends[0], -ends[1])))
    high = torch.where(up, ends[1], torch.where(down, -ends[0], torch.maximum(ends[1], -ends[0])))
    if value is None:  # by zero, or without bound
        low, high = low.clamp_max(0), high.clamp_min(0)
    affine = f.cvx & f.ccv
    found = Facts(
        torch.where(up, f.cvx, torch.where(down, f.ccv, affine)),
        torch.where(up, f.ccv, torch.where(down, f.cvx, affine)),
        (f.pos & up),
        f.lcx & up,
        f.flat,
        *saturated(low, high),
    )
    return found.rooted(f.origin, f.follows & up) if f.cvx.shape == f.origin.cvx.shape else found


def widened(f: Facts, shape: torch.Size) -> Facts:
    """Broadcast."""
    if f.cvx.shape == shape:
        return f
    return f.shaped(lambda t: t.expand(shape))


def plus(a: Facts, b: Facts, inputs: int, *, minus: bool = False) -> Facts:
    """Carry facts through a sum or a difference.

    Args:
        a: of the first.
        b: of the second.
        inputs: number of inputs that slopes are kept for.
        minus: whether the second is subtracted.

    Returns:
        the facts of the result.
    """
    shape = torch.broadcast_shapes(a.cvx.shape, b.cvx.shape)
    a, b = widened(a, shape), widened(b, shape)
    (lo, hi), (low, high) = a.slopes(inputs), b.slopes(inputs)
    no = torch.zeros_like(a.cvx)
    if minus:
        low, high = -high, -low
        b = Facts(b.ccv, b.cvx, no, no, b.flat, None, None, root=b.origin, same=b.flat)
    found = Facts(
        a.cvx & b.cvx,
        a.ccv & b.ccv,
        a.pos & b.pos,
        a.lcx & b.lcx,
        a.flat & b.flat,
        *saturated(lo + low, hi + high),
    )
    return _same_root(found, a, b)


def _same_root(found: Facts, a: Facts, b: Facts) -> Facts:
    """Keep the root of a sum where both summands have it, or one is flat."""
    if bool(b.flat.all()) and a.origin.cvx.shape == found.cvx.shape:
        return found.rooted(a.origin, a.follows)
    if bool(a.flat.all()) and b.origin.cvx.shape == found.cvx.shape:
        return found.rooted(b.origin, b.follows)
    if a.origin is b.origin:
        return found.rooted(a.origin, a.follows & b.follows)
    return found
