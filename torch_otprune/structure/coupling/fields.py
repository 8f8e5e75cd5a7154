"""Labels on a tensor: one integer for every place, stored only along the axes where it varies.

A field is an int64 tensor of its tensor's own shape. Along an axis where all labels are equal its
stride is 0, so a field of a feature map is as small as the list of its channels, and every op
that moves numbers can be carried out on the field itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["compact", "core", "spread", "varying"]


def varying(field: Tensor) -> tuple[int, ...]:
    """List the axes along which a compact field varies."""
    return tuple(d for d, n in enumerate(field.shape) if n > 1 and field.stride(d) != 0)


def core(field: Tensor) -> Tensor:
    """Take what is stored: length 1 along every axis where the labels are equal."""
    for axis, size in enumerate(field.shape):
        if size > 1 and field.stride(axis) == 0:
            field = field.narrow(axis, 0, 1)
    return field


def compact(field: Tensor) -> Tensor:
    """Find the axes along which nothing varies, and store them once.

    Args:
        field: int64, any strides.

    Returns:
        the same labels.
    """
    kept = core(field)
    for axis, size in enumerate(kept.shape):
        if size > 1:
            first = kept.narrow(axis, 0, 1)
            if _alike(kept, first, axis):
                kept = first
    return kept.expand(field.shape)


def _alike(field: Tensor, first: Tensor, axis: int) -> bool:
    corner = field[tuple(slice(None) if d == axis else slice(1) for d in range(field.dim()))]
    return bool((corner == corner.flatten()[0]).all()) and bool((field == first).all())


def spread(field: Tensor, shape: Iterable[int]) -> Tensor:
    """Write a field of length 1 along some axes in a larger shape."""
    return torch.broadcast_to(field, tuple(shape))
