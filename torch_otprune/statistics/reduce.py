"""Sums over all ranks, in float64; the identity where nothing is distributed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_sum_", "first_rank_", "ranks", "share"]


def ranks() -> int:
    """Count the processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(samples: int) -> int:
    """Divide a number of samples among the ranks, rounding up."""
    return -(-samples // ranks())


def all_sum_(tensors: Iterable[Tensor]) -> None:
    """Add every tensor up over all ranks, in place.

    Args:
        tensors: the same shapes in the same order on every rank.
    """
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def first_rank_(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with the first rank's.

    Args:
        tensors: the same shapes in the same order on every rank.
    """
    if ranks() > 1:
        for tensor in tensors:
            with torch.no_grad():
                dist.broadcast(tensor, src=0)
