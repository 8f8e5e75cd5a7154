"""Directions in which two clouds of features differ, found on detached batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.line import sort_rows

__all__ = ["ascend", "gaps", "principal", "unit"]

_REACH = 8.0  # length of the first ascent step beside the unit vector: nearly a power step
_COLD, _WARM = 6, 1  # subspace iterations from a random start, and from the last step's


def unit(columns: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    """Scale every column to length 1; a column of zeros stays."""
    return F.normalize(columns, dim=0, eps=torch.finfo(columns.dtype).tiny)


def gaps(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], theta: Float[Tensor, "d m"]
) -> Float[Tensor, " m"]:
    """Measure W_2 of two projected clouds.

    Args:
        x: one cloud.
        y: another one of as many points.
        theta: a direction per column.

    Returns:
        one distance per direction.
    """
    moved = sort_rows((x @ theta).T) - sort_rows((y @ theta).T)
    distance: Tensor = torch.linalg.vector_norm(moved, dim=1) / len(x) ** 0.5
    return distance


def ascend(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    starts: Float[Tensor, "d m"],
    *,
    steps: int,
    width: int,
) -> Float[Tensor, " d"]:
    """Walk from the best starts to a direction of larger distance.

    Args:
        x: one cloud.
        y: another one of as many points.
        starts: unit vectors, one per column.
        steps: normalised ascent steps from each start.
        width: how many of the starts walk.

    Returns:
        the best unit vector met, no worse than any start.

    Source: Deshpande et al. 2019 for the distance. Ours: with the matching frozen the squared
    distance is a quadratic form, whose power step needs no step size; where the matching changes
    on the way and the step falls short, a shorter one is tried.
    """
    distance = gaps(x, y, starts)
    best = distance.topk(min(width, starts.shape[1])).indices
    kept, height = starts[:, best], distance[best]
    reach = torch.full_like(height, _REACH)
    for _ in range(steps):
        theta = unit(kept + reach * unit(_pull(x, y, kept)))
        distance = gaps(x, y, theta)
        better = distance > height
        kept = torch.where(better, theta, kept)
        height = torch.where(better, distance, height)
        reach = torch.where(better, reach, reach / 4)
    return kept.index_select(1, height.argmax()[None])[:, 0]


def _pull(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """Compute the derivative of half the squared distance, up to its factor 1 / n."""
    s, t = x @ theta, y @ theta
    i, j = s.argsort(dim=0, stable=True), t.argsort(dim=0, stable=True)
    gap = s.gather(0, i) - t.gather(0, j)
    at_x, at_y = torch.empty_like(s).scatter_(0, i, gap), torch.empty_like(t).scatter_(0, j, gap)
    return x.T @ at_x - y.T @ at_y


def principal(
    z: Float[Tensor, "n d"], start: Float[Tensor, "d q"], *, warm: bool
) -> Float[Tensor, "d q"]:
    """Follow the leading principal directions of a cloud by subspace iteration.

    Args:
        z: the cloud.
        start: linearly independent columns.
        warm: whether the start is the answer for a similar cloud.

    Returns:
        orthonormal columns; approximate, since only good starts for `ascend` are needed.
    """
    z = z - z.mean(0)
    for _ in range(_WARM if warm else _COLD):
        start = torch.linalg.qr(unit(z.T @ (z @ start)))[0]
    return start
