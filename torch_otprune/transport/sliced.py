"""Distances through one-dimensional projections: cheap averages, and the worst direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.ascent import climb
from torch_otprune.transport.checks import at_least_one, cloud, clouds, order_of, refuse
from torch_otprune.transport.cost import root, sqdist
from torch_otprune.transport.exact import Links, solve_line
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
        draw = torch.randn(dims, size, generator=generator, dtype=torch.float64, device="cpu")
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
    (x, y), p = clouds(x, y), order_of(p)
    at_least_one(count, "count")
    *batch, n, d = x.shape
    if d == 1:
        return _columns(x, y, p).reshape(batch)
    theta = directions(d, count, seed=seed).to(x)
    step = max(1, ENTRIES // (math.prod(batch) * max(n, y.shape[-2])))
    every = torch.cat([_columns(x @ t, y @ t, p) for t in torch.split(theta, step, dim=1)], dim=-1)
    top = every.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return top[..., 0] * root((every / top).pow(p).mean(-1), p)


def _columns(s: Tensor, t: Tensor, p: float) -> Tensor:
    """Measure W_p between matching columns of two batches, all columns of all at once."""
    *batch, columns = s[..., 0, :].shape
    left, right = (c.movedim(-2, 0).reshape(c.shape[-2], -1) for c in (s, t))
    return wasserstein_1d(left, right, p=p).reshape(*batch, columns)


@dataclass(frozen=True, eq=False)
class MaxSliced:
    """The largest distance found in one direction.

    Args:
        distance: W_p along the direction, differentiable in the points: a lower bound of W_p,
            and of the true maximum.
        direction: unit vector.
        steps: how many were taken from the start that won, the most in a batch.
    """

    distance: Float[Tensor, "*batch"]
    direction: Float[Tensor, "*batch d"]
    steps: int


def max_sliced(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch m d"],
    *,
    p: float = 2.0,
    steps: int = 20,
    restarts: int = 8,
    seed: int = 0,
) -> MaxSliced:
    """Find the direction in which two clouds differ most.

    Args:
        x: one cloud, or a batch of them.
        y: as many others, in the same space.
        p: order of the distance.
        steps: power steps from each start, with the matching of the last step frozen; the best of
            them is then followed to the top.
        restarts: random starts beside the informed ones.
        seed: of the random starts.

    Returns:
        distance and direction of each pair; a lower bound of the maximum, as the problem is not
        concave. The gradient is that of the local maximum: where matchings tie there, a mixture of
        theirs.

    Source: Deshpande et al. 2019 for the distance; the frozen-matching power step is ours: for a
    fixed matching the squared distance is a quadratic form, and its power step costs n x d.
    """
    (x, y), p = clouds(x, y), order_of(p)
    *batch, n, d = x.shape
    xs, ys = x.detach().reshape(-1, n, d), y.detach().reshape(-1, y.shape[-2], d)
    with torch.no_grad():
        theta, taken = _best_directions(xs, ys, p=p, steps=steps, restarts=restarts, seed=seed)
        tops = [_top(*one, p=p) for one in zip(xs, ys, theta, strict=True)]
    # Some tops are ridges of more sides than others.
    most = max(len(shares) for _, shares, _ in tops)
    sides = torch.stack([_filled(side, most) for side, _, _ in tops]).reshape(*batch, d, most)
    shares = torch.stack([_filled(share, most) for _, share, _ in tops]).reshape(*batch, most)
    shares = shares / shares.sum(-1, keepdim=True)
    every = _columns(x @ sides, y @ sides, p)
    mixed = (every * shares).sum(-1)
    distance = every[..., 0].detach() + (mixed - mixed.detach())
    steps = max(few + more for few, (_, _, more) in zip(taken, tops, strict=True))
    return MaxSliced(distance, sides[..., 0], steps)


def _top(x: Tensor, y: Tensor, theta: Tensor, *, p: float) -> tuple[Tensor, Tensor, int]:
    """Follow one direction to its local maximum."""
    ranks = _ranks(x, y)

    def slope(at: Tensor) -> tuple[Tensor, float]:
        pull, power = _pull(x[None], y[None], at[None, :, None], ranks, p)
        value = float(power)
        # Of the logarithm: no unit can overflow it, and a step gains the same share anywhere.
        if value <= 0:
            return torch.zeros_like(at), 0.0
        return pull[0, :, 0] / value, math.log(value) / p

    return climb(slope, theta)


def _filled(part: Tensor, most: int) -> Tensor:
    """Repeat the first side, with no share of its own."""
    more = most - part.shape[-1]
    if part.ndim == 1:
        return torch.nn.functional.pad(part, (0, more))
    return torch.cat([part, part[:, :1].expand(-1, more)], dim=1)


def _best_directions(
    x: Tensor, y: Tensor, *, p: float, steps: int, restarts: int, seed: int
) -> tuple[Tensor, list[int]]:
    theta, ranks = _starts(x, y, restarts, seed), _ranks(x[0], y[0])
    best, value = theta[:, :, 0], x.new_full((len(x),), -1.0)
    taken = torch.zeros_like(value, dtype=torch.long)
    live = torch.ones_like(taken, dtype=torch.bool)
    for step in range(steps + 1):
        pull, power = _pull(x, y, theta, ranks, p)
        most, top = power.max(1)
        better = live & (most > value * (1 + 1e-6))
        found = theta.gather(2, top[:, None, None].expand(-1, theta.shape[1], 1))[:, :, 0]
        best, value = found.where(better[:, None], best), most.where(better, value)
        taken = taken.masked_fill(better, step)
        live = live & (better | (step <= 3))
        if not bool(live.any()):
            break
        length = pull.norm(dim=1, keepdim=True)
        theta = torch.where(length > 0, pull / length.clamp(min=1e-30), theta)
    return best, taken.tolist()


def _starts(x: Tensor, y: Tensor, restarts: int, seed: int) -> Tensor:
    """Start from the shift of the mean, the largest changes of spread, and at random."""
    shift = (x.mean(1) - y.mean(1))[:, :, None]
    random = directions(x.shape[2], max(1, restarts), seed=seed).to(x).expand(len(x), -1, -1)
    theta = torch.cat([shift, _spread_changes(x, y), random], dim=2)
    length = theta.norm(dim=1, keepdim=True)
    return torch.where(length > 0, theta / length.clamp(min=1e-30), random[:, :, :1])


def _spread_changes(x: Tensor, y: Tensor) -> Tensor:
    """Find the directions whose variance changes most, by a few subspace iterations."""
    d = x.shape[2]
    theta = directions(d, min(4, d), seed=1).to(x).expand(len(x), -1, -1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    for _ in range(6):
        new = x.mT @ (x @ theta) / x.shape[1] - y.mT @ (y @ theta) / y.shape[1]
        scale = new.abs().amax((1, 2), keepdim=True)
        frame = torch.linalg.qr(torch.where(scale > 0, new / scale.clamp(min=1e-30), theta))[0]
        theta = torch.where(scale > 0, frame, theta)
    return theta


def _ranks(x: Tensor, y: Tensor) -> Links:
    """Couple places in sorted order: on the line every two samples of these sizes go alike."""
    places = (torch.arange(len(c), device=c.device).to(c) for c in (x, y))
    weights = (c.new_full((len(c),), 1 / len(c)) for c in (x, y))
    return solve_line(*places, *weights, uniform=True)


def _pull(x: Tensor, y: Tensor, theta: Tensor, links: Links, p: float) -> tuple[Tensor, Tensor]:
    """Return the ascent direction and W_p^p for each column of theta, its matching frozen."""
    s, t = x @ theta, y @ theta
    i = s.argsort(dim=1, stable=True)[:, links.rows]
    j = t.argsort(dim=1, stable=True)[:, links.columns]
    gap, mass = s.gather(1, i) - t.gather(1, j), links.mass.to(x)[:, None]
    force = mass * gap.abs().pow(p - 1) * gap.sign()
    at_x = torch.zeros_like(s).scatter_add_(1, i, force)
    at_y = torch.zeros_like(t).scatter_add_(1, j, force)
    return x.mT @ at_x - y.mT @ at_y, (mass * gap.abs().pow(p)).sum(1)


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
    at_least_one(count, "count")
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
    refuse(
        gamma is not None and not 0 <= gamma < math.inf,
        f"gamma is {gamma}.",
        where="sliced_kernel, argument gamma",
        fix="pass a finite inverse squared length of at least 0, or None.",
    )
    squared = sqdist(features)
    if gamma is None:
        away = squared[~torch.eye(len(squared), dtype=torch.bool, device=squared.device)]
        middle = float(away.median()) if away.numel() else 0.0
        gamma = 1 / middle if middle > 0 else 1.0
    return (-gamma * squared).exp()
