"""Distances through one-dimensional projections: cheap averages, and the worst direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, order_of, same_space
from torch_otprune.transport.cost import root, sqdist
from torch_otprune.transport.exact import solve_line
from torch_otprune.transport.line import quantiles, wasserstein_1d

__all__ = [
    "MaxSliced",
    "directions",
    "max_sliced",
    "sliced",
    "sliced_features",
    "sliced_kernel",
]

ENTRIES = 2**26  # projections held at a time


def directions(dims: int, count: int, *, seed: int = 0) -> Float[Tensor, "dims count"]:
    """Draw unit vectors in orthogonal groups, which spread better than independent ones.

    Args:
        dims: dimension of the space.
        count: how many.
        seed: the same seed gives the same directions on every device and rank.

    Returns:
        one direction per column, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for start in range(0, count, dims):
        size = min(dims, count - start)
        draw = torch.randn(dims, size, generator=generator, dtype=torch.float64)
        frame, upper = torch.linalg.qr(draw)
        # The sign of a QR column is up to the library: tie it to the draw.
        groups.append(frame * upper.diagonal().sign())
    return torch.cat(groups, dim=1)


def sliced(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch m d"],
    *,
    p: float = 2.0,
    count: int = 128,
    seed: int = 0,
) -> Float[Tensor, "*batch"]:
    """Average W_p over directions: the p-th root of the mean p-th power.

    Args:
        x: one cloud, or a batch of them.
        y: as many clouds in the same space.
        p: order of the distance.
        count: number of directions.
        seed: of the directions.

    Returns:
        one distance per pair, in the unit of the points; differentiable. A translation by v
        gives |v| / sqrt(d) for p=2: multiply by sqrt(d) to compare with W_2.

    Source: Rabin et al. 2012; orthogonal groups of directions after Rowland et al. 2019.

    Limits: never above W_p, and at most W_p apart from it by what is not seen in projections.
    """
    if x.ndim > 2:
        pairs = zip(x, y, strict=True)
        return torch.stack([sliced(s, t, p=p, count=count, seed=seed) for s, t in pairs])
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    if x.shape[1] == 1:
        return wasserstein_1d(x, y, p=p)[0]
    theta = directions(x.shape[1], count, seed=seed).to(x)
    step = max(1, ENTRIES // max(len(x), len(y)))
    parts = [
        wasserstein_1d(x @ part, y.to(x) @ part, p=p) for part in torch.split(theta, step, dim=1)
    ]
    every = torch.cat(parts)
    top = every.detach().max().clamp(min=torch.finfo(x.dtype).tiny)
    return top * root((every / top).pow(p).mean(), p)


@dataclass(frozen=True, eq=False)
class MaxSliced:
    """The largest distance found in one direction.

    Args:
        distance: W_p along the direction, differentiable in the points: a lower bound of W_p,
            and of the true maximum.
        direction: unit vector.
        steps: how many were taken from the start that won.
    """

    distance: Float[Tensor, ""]
    direction: Float[Tensor, " d"]
    steps: int


def max_sliced(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    p: float = 2.0,
    steps: int = 20,
    restarts: int = 8,
    seed: int = 0,
) -> MaxSliced:
    """Find the direction in which two clouds differ most.

    Args:
        x: one cloud.
        y: another, in the same space.
        p: order of the distance.
        steps: power steps from each start, with the matching of the last step frozen.
        restarts: random starts beside the informed ones.
        seed: of the random starts.

    Returns:
        distance and direction; a lower bound of the maximum, as the problem is not concave.

    Source: Deshpande et al. 2019 for the distance; the frozen-matching power step is ours: for a
    fixed matching the squared distance is a quadratic form, and its power step costs n x d.
    """
    x, y, p = cloud(x, "x"), cloud(y, "y"), order_of(p)
    same_space(x, y)
    y = y.to(x)
    with torch.no_grad():
        theta, taken = _best_direction(
            x.detach(), y.detach(), p=p, steps=steps, restarts=restarts, seed=seed
        )
    distance = wasserstein_1d(x @ theta[:, None], y @ theta[:, None], p=p)[0]
    return MaxSliced(distance, theta, taken)


def _best_direction(
    x: Tensor, y: Tensor, *, p: float, steps: int, restarts: int, seed: int
) -> tuple[Tensor, int]:
    theta = _starts(x, y, restarts, seed)
    best, value, taken = theta[:, 0], x.new_tensor(-1.0), 0
    for step in range(steps + 1):
        pull, power = _pull(x, y, theta, p)
        top = power.argmax()
        if power[top] > value * (1 + 1e-6):
            best, value, taken = theta[:, top].clone(), power[top], step
        elif step > 3:
            break
        length = pull.norm(dim=0)
        theta = torch.where(length > 0, pull / length.clamp(min=1e-30), theta)
    return best, taken


def _starts(x: Tensor, y: Tensor, restarts: int, seed: int) -> Tensor:
    """Start from the shift of the mean, the largest changes of spread, and at random."""
    shift = (x.mean(0) - y.mean(0))[:, None]
    random = directions(x.shape[1], max(1, restarts), seed=seed).to(x)
    spread = _spread_changes(x, y)
    theta = torch.cat([shift, spread, random], dim=1)
    length = theta.norm(dim=0)
    return torch.where(length > 0, theta / length.clamp(min=1e-30), random[:, :1])


def _spread_changes(x: Tensor, y: Tensor) -> Tensor:
    """Find the directions whose variance changes most, by a few subspace iterations."""
    theta = directions(x.shape[1], min(4, x.shape[1]), seed=1).to(x)
    x, y = x - x.mean(0), y - y.mean(0)
    for _ in range(6):
        theta = x.T @ (x @ theta) / len(x) - y.T @ (y @ theta) / len(y)
        if not bool(theta.abs().max() > 0):
            return directions(x.shape[1], 1, seed=1).to(x)
        theta = torch.linalg.qr(theta / theta.abs().max())[0]
    return theta


def _pull(x: Tensor, y: Tensor, theta: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the ascent direction and W_p^p for each column of theta, its matching frozen."""
    s, t = x @ theta, y @ theta
    if len(x) == len(y):
        i, j = s.argsort(dim=0, stable=True), t.argsort(dim=0, stable=True)
        gap = s.gather(0, i) - t.gather(0, j)
        force = gap.abs().pow(p - 1) * gap.sign() / len(x)
        at_x = torch.zeros_like(s).scatter_(0, i, force)
        at_y = torch.zeros_like(t).scatter_(0, j, force)
        return x.T @ at_x - y.T @ at_y, gap.abs().pow(p).mean(0)
    a, b = x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), 1 / len(y))
    pulls, powers = [], []
    for left, right in zip(s.T, t.T, strict=True):
        links = solve_line(left, right, a, b)
        mass, gap = links.mass.to(x), left[links.rows] - right[links.columns]
        force = mass * gap.abs().pow(p - 1) * gap.sign()
        at_x = torch.zeros_like(left).index_add_(0, links.rows, force)
        at_y = torch.zeros_like(right).index_add_(0, links.columns, force)
        pulls.append(x.T @ at_x - y.T @ at_y)
        powers.append((mass * gap.abs().pow(p)).sum())
    return torch.stack(pulls, dim=1), torch.stack(powers)


def sliced_features(
    x: Float[Tensor, "n d"], *, count: int = 64, levels: int = 64, seed: int = 0
) -> Float[Tensor, " features"]:
    """Embed a cloud so that Euclidean distances are sliced W_2 distances.

    Args:
        x: one cloud; all clouds to compare need the same dimension and seed.
        count: directions.
        levels: quantile bins per direction.
        seed: of the directions.

    Returns:
        count x levels numbers in the unit of the points (levels alone in one dimension). Distances
        between them are sliced W_2 for these directions, from below, exact for levels = n.

    Source: Kolouri, Zou & Rohde 2016: sliced W_2 is Hilbertian, so kernels on it are positive.
    """
    x = cloud(x, "x")
    if x.shape[1] > 1:
        x = x @ directions(x.shape[1], count, seed=seed).to(x)
    scale: float = (x.shape[1] * levels) ** 0.5
    return quantiles(x, levels).reshape(-1) / scale


def sliced_kernel(
    features: Float[Tensor, "clouds features"], *, gamma: float | None = None
) -> Float[Tensor, "clouds clouds"]:
    """Turn features into the positive definite kernel exp(-gamma SW_2^2).

    Args:
        features: one row of `sliced_features` per cloud.
        gamma: inverse squared length; None is one over the median squared distance.

    Returns:
        a symmetric matrix with ones on its diagonal.
    """
    features = cloud(features, "features")
    squared = sqdist(features)
    if gamma is None:
        away = squared[~torch.eye(len(squared), dtype=torch.bool, device=squared.device)]
        middle = float(away.median()) if away.numel() else 0.0
        gamma = 1 / middle if middle > 0 else 1.0
    return (-gamma * squared).exp()
