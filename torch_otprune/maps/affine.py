"""The affine map from moments alone: least squares where pairs are known, Bures where not."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.maps.base import AffineFit, FittedMap, TransportMap, register
from torch_otprune.maps.samples import Samples
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.transport import gaussian

__all__ = ["AffineMap", "bures_map", "least_squares_map", "with_moments"]


@register
class AffineMap(TransportMap):
    """Fit an affine map from means and covariances.

    With pairs it is ridge regression, whose values are the nearest to the target's. Without, it
    is the optimal map between Gaussians of these moments: it restores the law up to its second
    moments, and says nothing about values.

    Limits: what is not Gaussian keeps its shape. With pairs, a regression has less spread than
    its target, by what cannot be predicted.

    Source: Olkin & Pukelsheim 1982 for the map between Gaussians.
    """

    across: ClassVar[bool] = True
    kind: Literal["affine"] = "affine"
    method: Literal["auto", "least_squares", "bures"] = Field(
        default="auto", description="`auto` is least squares with pairs, else Bures"
    )
    ridge: float = Field(default=1e-6, ge=0, description="share of the mean variance of the source")

    def fitted(self, samples: Samples) -> FittedMap:
        """Fit to moments."""
        matched = None if self.method == "bures" else samples.matched
        if matched is None:
            mean_x, cov_x = _moments(samples.x)
            mean_y, cov_y = _moments(samples.y)
            matrix, shift = bures_map(mean_x, cov_x, mean_y, cov_y)
        else:
            x, y = matched
            mean_x, cov_x = _moments(x)
            mean_y = y.mean(0)
            cross = (x - mean_x).T @ (y - mean_y) / len(x)
            matrix, shift = least_squares_map(mean_x, cov_x, mean_y, cross, ridge=self.ridge)
        return AffineFit(self.kind, samples, matrix=matrix, shift=shift)


def bures_map(
    mean_x: Float[Tensor, " d"],
    cov_x: Float[Tensor, "d d"],
    mean_y: Float[Tensor, " d"],
    cov_y: Float[Tensor, "d d"],
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """Map one Gaussian onto another at the least cost.

    Args:
        mean_x: of the source.
        cov_x: of the source; directions without variance are mapped to the mean.
        mean_y: of the target.
        cov_y: of the target.

    Returns:
        matrix and shift, in float64.
    """
    found = gaussian(mean_x, cov_x, mean_y, cov_y).matrix
    return found, mean_y.double() - found @ mean_x.double()


def least_squares_map(
    mean_x: Float[Tensor, " d"],
    cov_x: Float[Tensor, "d d"],
    mean_y: Float[Tensor, " e"],
    cross: Float[Tensor, "d e"],
    *,
    ridge: float = 1e-6,
) -> tuple[Float[Tensor, "e d"], Float[Tensor, " e"]]:
    """Regress a target on a source.

    Args:
        mean_x: of the source.
        cov_x: of the source.
        mean_y: of the target.
        cross: covariance of source with target, source first.
        ridge: share of the source's mean variance.

    Returns:
        matrix and shift.
    """
    found = torch.cholesky_solve(cross, ridge_factor(cov_x, ridge)).T
    return found, mean_y - found @ mean_x


def with_moments(
    matrix: Float[Tensor, "d d"], shift: Float[Tensor, " d"], samples: Samples
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """Give what a map writes the means and covariances of the target.

    A distance of samples is mostly bias in many dimensions and falls where spread is lost, so a
    map that was fitted to one loses spread.

    Args:
        matrix: of the map.
        shift: its constant.
        samples: source and target.

    Returns:
        matrix and shift of the map, followed by the one between Gaussians.
    """
    mean_x, cov_x = _moments(samples.x @ matrix.T + shift)
    after, constant = bures_map(mean_x, cov_x, *_moments(samples.y))
    return after @ matrix, after @ shift + constant


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    around = x - mean
    return mean, around.T @ around / len(x)
