"""Fewer dimensions for clouds that are too large to store their costs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import at_least_one, cloud, same_space
from torch_otprune.transport.dispatch import REDUCED, STORED

__all__ = ["principal"]


def principal(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], dims: int | None = None
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m k"], float]:
    """Project two clouds on the main directions of both together.

    Args:
        x: one cloud.
        y: another, in the same space.
        dims: directions to keep; None keeps 64 where n x m costs do not fit, and all elsewhere.

    Returns:
        both clouds in the new coordinates, and the share of the pooled variance left out, in
        [0, 1]. Distances can only shrink: those of what was left out are missing. Gradients are
        those of frozen directions.
    """
    same_space(x, y)
    d = x.shape[1]
    if dims is None:
        dims = d if len(x) * len(y) <= STORED else REDUCED
    at_least_one(dims, "dims")
    if dims >= d:
        return x, y, 0.0
    x, y = cloud(x, "x"), cloud(y, "y")
    # Directions are held still: their derivative does not exist where two spreads are equal.
    pooled = torch.cat([x, y]).detach().double()
    centre = pooled.mean(0)
    pooled -= centre
    values, vectors = torch.linalg.eigh(pooled.T @ pooled)
    total = float(values.clamp(min=0).sum())
    kept = vectors[:, -dims:].flip(1).to(x)
    left_out = float(values[:-dims].clamp(min=0).sum()) / total if total > 0 else 0.0
    middle = centre.to(x)
    return (x - middle) @ kept, (y - middle) @ kept, left_out
