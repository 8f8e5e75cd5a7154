"""Measures on the line, where sorting solves the transport problem exactly."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import at_least_one, cloud, masses, order_of, same_space
from torch_otprune.transport.cost import root, sqdist

__all__ = ["pairwise_1d", "quantiles", "sort_rows", "wasserstein_1d"]


def sort_rows(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Sort every row; on a CPU by numpy, whose vector sort is many times faster."""
    if x.device.type != "cpu":
        return x.sort(dim=-1, stable=True).values
    if torch.is_grad_enabled() and x.requires_grad:
        return x.gather(-1, torch.from_numpy(np.argsort(x.detach().contiguous().numpy(), axis=-1)))
    rows = x.detach().clone(memory_format=torch.contiguous_format).numpy()
    rows.sort(axis=-1)
    return torch.from_numpy(rows)


def pairwise_1d(
    x: Float[Tensor, "*batch samples channels"], *, p: float = 2.0
) -> Float[Tensor, "*batch channels channels"]:
    """Measure W_p between every two columns, each a one-dimensional measure.

    Args:
        x: one column per measure, all weighted uniformly, in any unit; layers of one shape may be
            stacked in front.
        p: order of the distance, at least 1.

    Returns:
        a symmetric matrix with a zero diagonal, in the unit of `x`, one per layer.

    Source: equal-size 1-D measures couple in sorted order (Peyré & Cuturi 2019, Remark 2.28), so
    the distance is exact; p=2 goes by matmul, and pairs that nearly coincide by difference.

    Limits: p other than 2 costs samples x channels^2 without a matmul to help.
    """
    x, p = cloud(x, "x", batched=True), order_of(p)
    rows, samples = sort_rows(x.mT), x.shape[-2]
    if p == 2:
        return root(sqdist(rows).div_(samples))
    total = torch.cdist(rows, rows, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    distance: Tensor = total / samples ** (1 / p)  # a mean over samples, not a sum
    return distance


def wasserstein_1d(
    x: Float[Tensor, "n channels"],
    y: Float[Tensor, "m channels"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    p: float = 2.0,
) -> Float[Tensor, " channels"]:
    """Measure W_p between matching columns of two samples of any sizes and weights.

    Args:
        x: one column per measure.
        y: as many columns, any number of rows.
        a: weights of the rows of x, scaled to total 1; None is uniform.
        b: weights of the rows of y, likewise.
        p: order of the distance, at least 1.

    Returns:
        one distance per column, in the unit of `x`; differentiable in x and y.

    Source: W_p^p is the integral of |F^-1 - G^-1|^p over (0, 1) (Peyré & Cuturi 2019, 2.6).
    """
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    y = y.to(x)
    if a is None and b is None and len(x) == len(y):
        gap = sort_rows(x.T) - sort_rows(y.T)
        if p <= 2:
            total: Tensor = torch.linalg.vector_norm(gap, p, dim=1) / len(x) ** (1 / p)
            return total
        return _power_mean(gap.abs(), None, p)
    return _merged(x, y, masses(a, x, len(x), "a"), masses(b, y, len(y), "b"), p)


def quantiles(
    x: Float[Tensor, "samples channels"], levels: int
) -> Float[Tensor, "channels levels"]:
    """Average each column's quantile function over equal bins of probability.

    Args:
        x: one column per measure.
        levels: number of bins.

    Returns:
        bin means, so that their mean is the mean of the column, in the unit of `x`.
    """
    at_least_one(levels, "levels")
    x = cloud(x, "x")
    rows = sort_rows(x.T)
    n = rows.shape[1]
    if n % levels == 0:
        return rows.view(len(rows), levels, -1).mean(-1)
    # Bin edges fall inside samples: integrate the step function up to each edge.
    total = torch.cat([rows.new_zeros(len(rows), 1), rows.cumsum(1)], dim=1)
    edge = torch.arange(levels + 1, device=x.device, dtype=x.dtype) * (n / levels)
    whole = edge.long().clamp(max=n - 1)
    upto = total[:, whole] + (edge - whole) * rows[:, whole]
    return upto.diff(dim=1) * (levels / n)


def _merged(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """Integrate over the union of both quantile grids."""
    xs, ys = x.sort(dim=0, stable=True), y.sort(dim=0, stable=True)
    left = (a / a.sum())[xs.indices].double().cumsum(0).T.contiguous()
    right = (b / b.sum())[ys.indices].double().cumsum(0).T.contiguous()
    level = torch.cat([left, right], dim=1).sort(dim=1).values
    step = level.diff(dim=1, prepend=level.new_zeros(len(level), 1))
    middle = level - step / 2
    i = torch.searchsorted(left, middle).clamp(max=len(x) - 1)
    j = torch.searchsorted(right, middle).clamp(max=len(y) - 1)
    gap = xs.values.T.gather(1, i) - ys.values.T.gather(1, j)
    return _power_mean(gap.abs(), step.to(gap), p)


def _power_mean(gap: Tensor, weight: Tensor | None, p: float) -> Tensor:
    """Take the weighted L_p norm of each row, without overflow for large p."""
    top = gap.detach().amax(dim=1, keepdim=True)
    scale = top.where(top > 0, top.new_ones(()))
    power = (gap / scale).pow(p)
    total = power.mean(1) if weight is None else (power * weight).sum(1)
    return scale[:, 0] * root(total, p)
