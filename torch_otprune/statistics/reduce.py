"""Sums over all ranks, in float64; the identity where nothing is distributed.

The only door to `torch.distributed`. Every function here is called by all ranks or by none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_objects",
    "all_rows",
    "all_sum_",
    "first_rank_",
    "rank",
    "ranks",
    "ranks_where",
    "share",
]


def ranks() -> int:
    """Count the processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number this process among them, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def share(samples: int) -> int:
    """Divide a number of samples among the ranks, rounding up."""
    return -(-samples // ranks())


def ranks_where(fact: bool) -> tuple[int, ...]:
    """Ask all ranks, so that they can fail together instead of waiting for the one that did.

    Args:
        fact: whether it holds here.

    Returns:
        the ranks on which it holds, the same on all of them.
    """
    facts = torch.zeros(ranks(), dtype=torch.float64, device="cpu")
    facts[rank()] = float(fact)
    all_sum_([facts])
    return tuple(facts.nonzero().flatten().tolist())


def all_sum_(tensors: Iterable[Tensor]) -> None:
    """Add every tensor up over all ranks, in place.

    Args:
        tensors: the same shapes in the same order on every rank, on any device.
    """
    if ranks() > 1:
        for tensor in tensors:
            there = _carried(tensor)
            dist.all_reduce(there)
            _write_(tensor, there)


def all_objects(value: Any) -> list[Any]:
    """Collect one object of every rank.

    Args:
        value: this rank's; it must pickle.

    Returns:
        the first rank's first, the same on every rank.
    """
    found: list[Any] = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, value)
    return found


def all_rows(tensor: Tensor) -> Tensor:
    """Put the rows of all ranks below one another, the first rank's first.

    Args:
        tensor: rows x columns; every rank may have another number of rows.

    Returns:
        all rows, the same on every rank, in the type that was given.
    """
    counts = torch.zeros(ranks(), dtype=torch.float64, device="cpu")
    counts[rank()] = len(tensor)
    all_sum_([counts])
    sizes = [int(count) for count in counts.tolist()]
    first = sum(sizes[: rank()])
    every = torch.zeros(sum(sizes), tensor.shape[1], dtype=torch.float64, device="cpu")
    every[first : first + len(tensor)] = tensor.double().cpu()
    all_sum_([every])
    return every.to(tensor.dtype)


def first_rank_(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with the first rank's.

    Args:
        tensors: the same shapes in the same order on every rank, on any device.
    """
    if ranks() > 1:
        for tensor in tensors:
            there = _carried(tensor.detach())
            dist.broadcast(there, src=0)
            _write_(tensor, there)


def _carried(tensor: Tensor) -> Tensor:
    """Bring a tensor to a device that the backend serves: NCCL knows no CPU."""
    served = [entry.partition(":")[0] for entry in dist.get_backend_config().split(",")]
    if tensor.device.type in served or not set(served) & {"cuda", "cpu"}:
        return tensor
    return tensor.to("cuda" if "cuda" in served else "cpu")  # the rank's current device


@torch.no_grad()
def _write_(tensor: Tensor, there: Tensor) -> None:
    if there.data_ptr() != tensor.data_ptr():
        tensor.copy_(there)
