"""Transport between Gaussians: exact from means and covariances alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, finite, refuse, same_space
from torch_otprune.transport.cost import root

__all__ = ["GaussianMap", "fitting", "gaussian", "gaussian_points", "matrix_root"]

FULL = 4096  # dimensions up to which covariances are formed
RANK = 512  # directions kept above that
ROUNDING = 1e-4  # of the largest entry or eigenvalue: what half precision may have left


@dataclass(frozen=True, eq=False)
class GaussianMap:
    """The distance between two Gaussians and the affine map that carries one onto the other.

    Args:
        distance: W_2 in the unit of the points; differentiable in both moments.
        source: mean of the source.
        target: mean of the target.
        basis: directions that move together; None is all of them.
        matrix: what they are multiplied with.
        scale: factor on every coordinate of the rest; None where there is no rest.
        left_out: share of the pooled variance in the rest, treated coordinate by coordinate.
    """

    distance: Float[Tensor, "*batch"]
    source: Float[Tensor, "*batch d"]
    target: Float[Tensor, "*batch d"]
    matrix: Float[Tensor, "*batch k k"]
    basis: Float[Tensor, "d k"] | None = None
    scale: Float[Tensor, " d"] | None = None
    left_out: float = 0.0

    def __call__(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
        """Carry points of the source to the target."""
        moved = (x - self.source[..., None, :]).to(self.matrix)
        if self.basis is None or self.scale is None:
            moved = moved @ self.matrix.mT
        else:
            main = moved @ self.basis
            moved = (moved - main @ self.basis.T) * self.scale + main @ self.matrix.T @ self.basis.T
        return moved.to(x) + self.target[..., None, :].to(x)


def gaussian(
    mean_x: Float[Tensor, "*batch d"],
    cov_x: Float[Tensor, "*batch d d"],
    mean_y: Float[Tensor, "*batch d"],
    cov_y: Float[Tensor, "*batch d d"],
) -> GaussianMap:
    """Measure W_2 between two Gaussians, or between the Gaussian parts of two measures.

    Args:
        mean_x: mean of the source; a batch of layers works too.
        cov_x: covariance of the source, positive semi-definite; directions without variance stay.
        mean_y: mean of the target.
        cov_y: covariance of the target.

    Returns:
        distance and map, computed in float64. For any two laws with these moments the distance is
        a lower bound of their W_2.

    Source: Dowson & Landau 1982; Gelbrich 1990 for the bound; the map as in Peyré & Cuturi 2019,
    Remark 2.31; gradients by the dual of Bures (Alberti 1983), with frozen maps.

    Example:
        >>> one, zero = torch.eye(2), torch.zeros(2)
        >>> float(gaussian(zero, one, zero, 4 * one).distance) ** 2
        2.0000000000000004
    """
    mean_x, cov_x = finite(mean_x, "mean_x").double(), finite(cov_x, "cov_x").double()
    mean_y, cov_y = finite(mean_y, "mean_y").double(), finite(cov_y, "cov_y").double()
    fitting(mean_x, cov_x, mean_y, cov_y)
    with torch.no_grad():
        there, bures = _bures(cov_x, cov_y)
        back, _ = _bures(cov_y, cov_x)
    # Equal in value to bures, and with its derivative in both covariances.
    live = _trace_gap(cov_x, there) + _trace_gap(cov_y, back)
    squared = (mean_x - mean_y).square().sum(-1) + bures + (live - live.detach())
    return GaussianMap(root(squared.clamp(min=0)), mean_x.detach(), mean_y.detach(), there)


def gaussian_points(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> GaussianMap:
    """Measure W_2 between the Gaussians fitted to two clouds.

    Args:
        x: source points.
        y: target points, in the same space.

    Returns:
        distance and map. Above 4 096 dimensions the 512 main directions of both clouds move
        together, and the rest moves coordinate by coordinate (low rank plus diagonal).
    """
    x, y = cloud(x, "x").double(), cloud(y, "y").double()
    same_space(x, y)
    if x.shape[1] <= FULL:
        return gaussian(x.mean(0), _cov(x), y.mean(0), _cov(y))
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    basis = _main_directions(x, y)
    low_x, low_y = x @ basis, y @ basis
    zero = x.new_zeros(basis.shape[1])
    low = gaussian(zero, _cov(low_x), zero, _cov(low_y))
    rest_x = (x - low_x @ basis.T).square().mean(0)
    rest_y = (y - low_y @ basis.T).square().mean(0)
    total = x.square().mean(0).sum()
    rest = {"rest_x": rest_x, "rest_y": rest_y, "total": total}
    return _joined(low, mean_x, mean_y, basis=basis, **rest)


def _joined(
    low: GaussianMap,
    mean_x: Tensor,
    mean_y: Tensor,
    *,
    basis: Tensor,
    rest_x: Tensor,
    rest_y: Tensor,
    total: Tensor,
) -> GaussianMap:
    """Add shift and rest to what the main directions say."""
    spread_x, spread_y = root(rest_x), root(rest_y)
    rest = (spread_x - spread_y).square().sum()
    squared = low.distance.square() + (mean_x - mean_y).square().sum() + rest
    scale = spread_y / spread_x.where(spread_x > 0, spread_x.new_ones(()))
    scale = scale.where(spread_x > 0, scale.new_zeros(()))
    share = float(rest_x.sum() / total) if float(total) > 0 else 0.0
    return GaussianMap(root(squared), mean_x, mean_y, low.matrix, basis, scale, share)


def matrix_root(
    cov: Float[Tensor, "*batch d d"], *, power: float = 0.5
) -> Float[Tensor, "*batch d d"]:
    """Raise a positive semi-definite matrix to a power; directions without variance stay 0.

    Args:
        cov: symmetric, positive semi-definite up to rounding.
        power: 0.5 for the root, -0.5 for the inverse root.

    Returns:
        a symmetric matrix.
    """
    values, vectors = torch.linalg.eigh((cov + cov.mT) / 2)
    least = values.detach()[..., 0] / values.detach().abs().amax(-1).clamp(min=1e-300)
    refuse(
        bool((least < -ROUNDING).any()),
        f"a covariance has an eigenvalue of {float(least.min()):.2g} times its largest.",
        where=f"covariance of shape {tuple(cov.shape)}",
        fix="pass positive semi-definite matrices.",
    )
    floor = values[..., -1:].clamp(min=0) * cov.shape[-1] * torch.finfo(cov.dtype).eps
    kept = values > floor
    raised = values.where(kept, values.new_ones(())).pow(power).where(kept, values.new_zeros(()))
    root_of: Tensor = (vectors * raised[..., None, :]) @ vectors.mT
    return root_of


def fitting(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> None:
    """Refuse moments of different sizes."""
    dims = mean_x.shape[-1:]
    refuse(
        cov_x.shape != cov_y.shape or cov_x.shape[-2:] != dims * 2 or mean_y.shape[-1:] != dims,
        f"covariances of shapes {tuple(cov_x.shape)} and {tuple(cov_y.shape)} do not fit.",
        where=f"gaussian, means of {mean_x.shape[-1]} and {mean_y.shape[-1]} dimensions",
        fix="pass square covariances of the same size as the means.",
    )
    for cov in (cov_x.detach(), cov_y.detach()):
        refuse(
            bool((cov - cov.mT).abs().max() > ROUNDING * cov.abs().max()),
            "a covariance is not symmetric.",
            where=f"gaussian, covariances of shape {tuple(cov.shape)}",
            fix="pass symmetric matrices.",
        )


def _bures(cov_x: Tensor, cov_y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the optimal linear map and the squared Bures distance."""
    half, other = matrix_root(cov_x), matrix_root(cov_y)
    inverse = matrix_root(cov_x, power=-0.5)
    middle = matrix_root(half @ cov_y @ half)
    # The nuclear norm of the product of roots: no second root to lose digits in.
    fidelity = torch.linalg.svdvals(half @ other).sum(-1)
    traces = cov_x.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_y.diagonal(dim1=-2, dim2=-1).sum(-1)
    return inverse @ middle @ inverse, (traces - 2 * fidelity).clamp(min=0)


def _trace_gap(cov: Tensor, matrix: Tensor) -> Tensor:
    return cov.diagonal(dim1=-2, dim2=-1).sum(-1) - (cov * matrix).sum((-2, -1))


def _cov(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.T @ x / len(x)


def _main_directions(x: Tensor, y: Tensor) -> Tensor:
    """Find the main directions of both clouds together, exactly if there are few points."""
    pooled = torch.cat([x, y]).detach()
    if len(pooled) <= RANK:
        return _frame(pooled.T)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(pooled), RANK, generator=generator, device="cpu").to(pooled)
    basis = _frame(pooled.T @ probe)
    for _ in range(3):  # subspace iterations sharpen the randomised range finder
        basis = _frame(pooled.T @ (pooled @ basis))
    return basis


def _frame(columns: Tensor) -> Tensor:
    frame: Tensor = torch.linalg.qr(columns)[0]
    return frame
