"""Means of measures: on the line, on a fixed support, and among Gaussians."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import at_least_one, cloud, finite, masses, positive, refuse
from torch_otprune.transport.couple import REFUSE
from torch_otprune.transport.gaussian import matrix_root
from torch_otprune.transport.line import sort_rows

__all__ = ["barycenter_1d", "barycenter_gaussian", "barycenter_grid"]

CELLS = 2**20  # entries of all kernels that are laid out at a time


def barycenter_1d(
    x: Float[Tensor, "samples channels"],
    weights: Float[Tensor, " channels"] | None = None,
    *,
    p: float = 2.0,
) -> Float[Tensor, " samples"]:
    """Average the laws of all columns in Wasserstein space.

    Args:
        x: one column per measure.
        weights: of the columns; None is uniform.
        p: 2 for the mean of quantile functions, 1 for their median (weights then unused).

    Returns:
        the quantiles of the barycenter in ascending order, in the unit of `x`.

    Source: Agueh & Carlier 2011, 6.1.
    """
    x = cloud(x, "x")
    refuse(
        p not in {1, 2},
        f"there is no closed form for p={p:g}.",
        where="barycenter_1d, argument p",
        fix="use p=2 or p=1.",
    )
    rows = sort_rows(x.T)
    if p == 1:
        return rows.median(dim=0).values
    share = masses(weights, x, x.shape[1], "weights")
    return share / share.sum() @ rows


def barycenter_grid(
    histograms: Float[Tensor, "measures n"],
    cost: Float[Tensor, "n n"],
    weights: Float[Tensor, " measures"] | None = None,
    *,
    eps: float = 0.01,
    tol: float = 1e-6,
    limit: int = 2000,
) -> Float[Tensor, " n"]:
    """Average histograms on one support, without the blur of plain entropic barycenters.

    Args:
        histograms: masses, one row per measure, each scaled to total 1.
        cost: ground cost between the points of the support, symmetric.
        weights: of the measures; None is uniform.
        eps: temperature relative to the mean cost.
        tol: total change of the answer at which to stop.
        limit: most iterations.

    Returns:
        the masses of the barycenter, with total 1.

    Source: Janati, Cuturi & Gramfort 2020, Algorithm 1 (debiased), in the log domain.
    """
    histograms, cost = finite(histograms, "histograms").double(), finite(cost, "cost").double()
    _supported(histograms, cost, eps, limit)
    batch = cost.expand(len(histograms), -1, -1)
    every = masses(histograms, batch, cost.shape[1], "histograms")
    share = masses(weights, histograms.T, len(histograms), "weights")
    share = (share / share.sum())[:, None]
    log_h = (every / every.sum(1, keepdim=True)).log()
    kernel = -cost / (eps * (float(cost.mean()) or 1.0))
    v, fix = torch.zeros_like(log_h), log_h.new_zeros(log_h.shape[1])
    old = fix.exp()
    for _ in range(limit):
        u = log_h - _smooth(kernel, v)
        through = _smooth(kernel.T, u)
        answer = fix + (share * through).sum(0)
        v = answer - through
        fix = (fix + answer - _smooth(kernel, fix[None])[0]) / 2
        new = answer.exp()
        moved, old = float((new - old).abs().sum()), new
        if moved <= tol:
            break
    refuse(
        not moved <= max(tol, REFUSE),
        f"{moved:.1%} of the mass still moves after {limit} iterations.",
        where="barycenter_grid, arguments eps and limit",
        fix="raise eps, or raise the limit of iterations.",
    )
    return new / new.sum()


def barycenter_gaussian(
    means: Float[Tensor, "measures d"],
    covs: Float[Tensor, "measures d d"],
    weights: Float[Tensor, " measures"] | None = None,
    *,
    tol: float = 1e-12,
    limit: int = 200,
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Average Gaussians in Wasserstein space.

    Args:
        means: one row per Gaussian.
        covs: their covariances.
        weights: of the Gaussians; None is uniform.
        tol: relative change at which to stop.
        limit: most iterations.

    Returns:
        mean and covariance of the barycenter, in float64.

    Source: the fixed point of Álvarez-Esteban et al. 2016, Theorem 4.2.
    """
    means, covs = finite(means, "means").double(), finite(covs, "covs").double()
    refuse(
        means.ndim != 2 or 0 in means.shape or covs.shape != (*means.shape, means.shape[-1]),
        f"means of shape {tuple(means.shape)} do not fit covariances of {tuple(covs.shape)}.",
        where="barycenter_gaussian, arguments means and covs",
        fix="pass measures x dimensions, and measures x dimensions x dimensions.",
    )
    share = masses(weights, means.T, len(means), "weights")
    share = share / share.sum()
    cov = torch.einsum("k,kij->ij", share, covs)
    for _ in range(limit):
        half, inverse = matrix_root(cov), matrix_root(cov, power=-0.5)
        middle = torch.einsum("k,kij->ij", share, matrix_root(half @ covs @ half))
        new = inverse @ middle @ middle @ inverse
        change = float((new - cov).norm())
        cov = new
        if change <= tol * float(cov.norm()):
            break
    return share @ means, cov


def _supported(histograms: Tensor, cost: Tensor, eps: float, limit: int) -> None:
    """Refuse histograms and costs of different supports, and settings out of range."""
    positive(eps, "eps")
    at_least_one(limit, "limit")
    refuse(
        histograms.ndim != 2 or cost.shape != (histograms.shape[-1],) * 2,
        f"histograms of shape {tuple(histograms.shape)} do not fit a cost of {tuple(cost.shape)}.",
        where="barycenter_grid, arguments histograms and cost",
        fix="pass measures x points, and points x points.",
    )


def _smooth(kernel: Tensor, rows: Tensor) -> Tensor:
    """Apply the kernel to every row in the log domain."""
    some = rows.split(max(1, CELLS // kernel.numel()))
    return torch.cat([torch.logsumexp(kernel + part[:, None], dim=2) for part in some])
