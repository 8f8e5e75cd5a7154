"""Labels on a tensor: one integer for every place, stored only along the axes where it varies.

A field is an int64 tensor of its tensor's own shape. Along an axis where all labels are equal its
stride is 0, so a field of a feature map is as small as the list of its channels, and every op
that moves numbers can be carried out on the field itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["compact", "core", "spread", "varying"]


def varying(field: Tensor) -> tuple[int, ...]:
    """List the axes along which a compact field varies."""
    return _varying(field.shape, field.stride())


@lru_cache(4096)
def _varying(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """A model has many tensors, and few shapes."""
    pairs = zip(shape, strides, strict=True)
    return tuple(d for d, (size, step) in enumerate(pairs) if size > 1 and step)


def core(field: Tensor) -> Tensor:
    """Take what is stored: length 1 along every axis where the labels are equal."""
    strides = field.stride()
    if 0 not in strides:
        return field
    return field.as_strided(_stored(field.shape, strides), strides)


@lru_cache(4096)
def _stored(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if s else 1 for n, s in zip(shape, strides, strict=True))


def compact(field: Tensor) -> Tensor:
    """Find the axes along which nothing varies, and store them once.

    Args:
        field: int64, any strides.

    Returns:
        the same labels.
    """
    kept = core(field)
    labels, alike = kept.numpy(), []
    for axis, size in enumerate(kept.shape):
        if size > 1 and (not labels.size or _alike(labels, axis)):
            labels = labels[(slice(None),) * axis + (slice(1),)]
            alike.append(axis)
    for axis in alike:
        kept = kept.narrow(axis, 0, 1)
    return kept.expand(field.shape)


def _alike(labels: npt.NDArray[np.int64], axis: int) -> bool:
    """Compare two places first: most axes differ there; where there is none, nothing does."""
    if not labels.size:
        return True
    corner = [0] * labels.ndim
    first = labels[tuple(corner)]
    corner[axis] = -1
    if labels[tuple(corner)] != first:
        return False
    return bool((labels == labels[(slice(None),) * axis + (slice(1),)]).all())


def spread(field: Tensor, shape: Iterable[int]) -> Tensor:
    """Write a field of length 1 along some axes in a larger shape."""
    return torch.broadcast_to(field, tuple(shape))
