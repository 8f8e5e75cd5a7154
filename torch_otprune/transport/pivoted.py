"""A diverse subset: pick what the ones picked before explain least."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.checks import reals, refuse

__all__ = ["Pivots", "pivoted_cholesky"]

ROUNDING = 1e-12  # of the trace: what is left below is no information


class Pivots(NamedTuple):
    """Nested diverse sets.

    Args:
        order: units, the most telling first.
        trace: what a set of each size, from none, leaves unexplained of the kernel's trace.
        rank: how many were picked before nothing was left to explain, or the steps ran out.
    """

    order: Int[Tensor, " units"]
    trace: Float[Tensor, " sizes"]
    rank: int


def pivoted_cholesky(
    column: Callable[[int], Float[Tensor, " units"]],
    diagonal: Float[Tensor, " units"],
    *,
    steps: int | None = None,
    among_equals: Float[Tensor, " units"] | None = None,
) -> Pivots:
    """Pick units greedily so that the determinant of their part of a kernel is largest.

    A unit's pivot is its variance given those picked before, so that the product of the first k
    pivots is the determinant of the k units' kernel; the sum over all that are left is what the
    best linear prediction from the k misses.

    Args:
        column: gives one column of a positive semi-definite kernel; each is asked for once.
        diagonal: of the kernel.
        steps: most to pick; None is all. What is left then follows by its variance, and the
            curve is an upper bound from there.
        among_equals: larger wins where pivots are equal, then the lower index.

    Returns:
        all units in order, and the curve.

    Raises:
        TransportError: if the diagonal is negative or not finite.

    Source: Harbrecht, Peters & Schneider 2012 for the trace; Chen, Zhang & Zhou 2018 for its use
    as greedy inference of a determinantal point process.
    """
    left = reals(diagonal, "diagonal").detach().double().clone()
    refuse(
        not bool(torch.isfinite(left).all()) or bool((left < 0).any()),
        "a kernel's diagonal is negative or not finite.",
        where="pivoted_cholesky, argument diagonal",
        fix="pass a positive semi-definite kernel.",
    )
    n = len(left)
    most = n if steps is None else min(steps, n)
    second = torch.zeros_like(left) if among_equals is None else among_equals.to(left)
    factor = left.new_zeros(most, n)
    order, trace = list[int](), [float(left.sum())]
    floor = ROUNDING * trace[0]
    while len(order) < most and float(left.max()) > floor:
        pivot = _largest(left, second)
        done = factor[: len(order)]
        known = done[:, pivot].contiguous() @ done
        row = (column(pivot).to(left) - known) / left[pivot].sqrt()
        factor[len(order)] = row
        left = (left - row.square()).clamp_min(0)
        left[pivot] = 0
        order.append(pivot)
        trace.append(float(left.sum()))
    return _completed(order, trace, left, second)


def _largest(left: Tensor, second: Tensor) -> int:
    """Break ties as the caller says: rounding must not decide."""
    equal = (left >= float(left.max()) * (1 - 1e-9)).nonzero()[:, 0]
    return int(equal[second[equal].argmax()])


def _completed(order: list[int], trace: list[float], left: Tensor, second: Tensor) -> Pivots:
    """Append what was not picked, by variance: each takes at least its own off the trace."""
    rest = torch.ones_like(left, dtype=torch.bool)
    rest[order] = False
    others = rest.nonzero()[:, 0]
    others = others[second[others].argsort(descending=True, stable=True)]
    others = others[left[others].argsort(descending=True, stable=True)]
    tail = left[others].flip(0).cumsum(0).flip(0)[1:] if len(others) else left[:0]
    end = tail.new_zeros(1 if len(others) else 0)
    curve = torch.cat([left.new_tensor(trace), tail, end])
    picked = torch.tensor(order, dtype=torch.int64, device=left.device)
    return Pivots(torch.cat([picked, others]), curve, len(order))
