"""Affine layers as float64 stencils: composed and added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.errors import StructureError
from torch_otprune.fold.geometry import Geometry, follow

__all__ = ["Stencil", "diagonal", "exact", "joined", "summed"]


@dataclass(frozen=True)
class Stencil:
    """One affine layer, in float64 on the CPU: not every device has float64.

    Args:
        geometry: how it slides.
        weight: output channels x input channels of a group x taps, also where it is transposed.
        bias: zero where the layer has none.
    """

    geometry: Geometry
    weight: Float[Tensor, "out inner *taps"]
    bias: Float[Tensor, " out"]


def exact(tensor: Tensor) -> Tensor:
    """Take a tensor to where stencils live, off the autograd graph."""
    return tensor.detach().to("cpu", torch.float64)


def diagonal(
    scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"], axes: int
) -> Stencil:
    """Write a scale and a shift per channel as a stencil of one tap.

    Args:
        scale: one factor per channel.
        shift: one summand per channel.
        axes: spatial axes.

    Returns:
        the stencil.
    """
    ones, size, shifts = (1,) * axes, len(scale), bool(shift.any())
    geometry = Geometry(
        size, size, ones, ones, ones, (0,) * axes, groups=size, bias=shifts, shifts=shifts
    )
    return Stencil(geometry, exact(scale).view(size, 1, *ones), exact(shift))


def joined(first: Stencil, second: Stencil) -> Stencil:
    """Compose two layers.

    Args:
        first: the layer that runs first.
        second: the layer that reads its output.

    Returns:
        the layer that stands for both; `follow` tells where it holds.
    """
    geometry = follow(first.geometry, second.geometry).geometry
    groups, inner = second.geometry.groups, second.weight.shape[1]
    blocks = second.weight.reshape(groups, -1, inner, prod(second.geometry.taps))
    through = torch.einsum("goit,gi->go", blocks, first.bias.view(groups, inner))
    bias = second.bias + through.flatten()  # a constant meets all taps alike
    return Stencil(geometry, _product(first, second, geometry), bias)


def _product(first: Stencil, second: Stencil, geometry: Geometry) -> Tensor:
    ones = (1,) * geometry.axes
    if second.geometry.diagonal:
        return first.weight * second.weight.view(-1, 1, *ones)
    if first.geometry.diagonal:  # spares a product with a diagonal matrix
        groups = second.geometry.groups
        blocks = second.weight.unflatten(0, (groups, -1))
        scaled: Tensor = (blocks * first.weight.view(groups, 1, -1, *ones)).flatten(0, 1)
        return scaled
    return _correlated(first, second, geometry)


def _correlated(first: Stencil, second: Stencil, geometry: Geometry) -> Tensor:
    """Add the first kernel once per tap of the second, shifted and mixed."""
    a, b = (_regrouped(s, geometry.groups) for s in (first, second))
    total = b.new_zeros(len(b), b.shape[1], a.shape[2], *geometry.taps)
    taps = product(*(range(n) for n in second.geometry.taps))
    distances = zip(second.geometry.dilation, first.geometry.stride, strict=True)
    steps = [dilation * stride for dilation, stride in distances]
    for tap, matrix in zip(taps, b.reshape(*b.shape[:3], -1).unbind(3), strict=True):
        origin = [int(u) * step for u, step in zip(tap, steps, strict=True)]
        mixed = torch.einsum("gom,gmi...->goi...", matrix, a)
        total[_window(first.geometry, origin, geometry.dilation)] += mixed
    return total.flatten(0, 1)


def _window(g: Geometry, origin: Sequence[int], lattice: Sequence[int]) -> tuple[Any, ...]:
    """Find where a kernel's taps lie in a larger one, whose taps are a lattice apart."""
    found: list[Any] = [...]
    for taps, dilation, start, gap in zip(g.taps, g.dilation, origin, lattice, strict=True):
        step = max(dilation // gap, 1)  # a single tap has no step, whatever its dilation
        found.append(slice(start // gap, start // gap + (taps - 1) * step + 1, step))
    return tuple(found)


def _regrouped(stencil: Stencil, groups: int) -> Tensor:
    """Write a grouped weight with fewer groups: groups x out x in x taps, zero across the old."""
    inner = stencil.geometry.groups // groups
    blocks = stencil.weight.unflatten(0, (groups, inner, -1))
    _, _, out, into, *taps = blocks.shape
    dense = blocks.new_zeros(groups, inner, out, inner, into, *taps)
    for block in range(inner):
        dense[:, block, :, block] = blocks[:, block]
    grouped: Tensor = dense.flatten(3, 4).flatten(1, 2)
    return grouped


def summed(first: Stencil, second: Stencil) -> Stencil:
    """Add two layers that read the same tensor.

    Args:
        first: one summand.
        second: the other.

    Returns:
        the layer that computes the sum, exact everywhere.

    Raises:
        StructureError: if the outputs do not lie on one another, or a padding is not zero.
    """
    wide, narrow = sorted((first, second), key=lambda s: s.geometry.padding, reverse=True)
    a, b = wide.geometry, narrow.geometry
    _check_sum(a, b)
    offset = [p - q for p, q in zip(a.padding, b.padding, strict=True)]
    spans = zip(a.taps, a.dilation, b.taps, b.dilation, offset, strict=True)
    lattice = [
        gcd(da if ka > 1 else 0, db if kb > 1 else 0, off) or 1 for ka, da, kb, db, off in spans
    ]
    taps = tuple((k - 1) // d + 1 for k, d in zip(a.extent, lattice, strict=True))
    groups = gcd(a.groups, b.groups)
    parts = [_regrouped(s, groups) for s in (wide, narrow)]
    total = parts[0].new_zeros(*parts[0].shape[:3], *taps)
    for part, g, origin in zip(parts, (a, b), ([0] * a.axes, offset), strict=True):
        total[_window(g, origin, lattice)] += part
    whole = replace(a, taps=taps, dilation=tuple(lattice), groups=groups)
    whole = replace(whole, bias=a.bias or b.bias, shifts=a.shifts or b.shifts)
    return Stencil(whole, total.flatten(0, 1), wide.bias + narrow.bias)


def _check_sum(wide: Geometry, narrow: Geometry) -> None:
    fits = (wide.into, wide.out, wide.stride) == (narrow.into, narrow.out, narrow.stride)
    plain = wide.mode == narrow.mode == "zeros" and not (wide.transposed or narrow.transposed)
    reach = zip(wide.padding, wide.extent, narrow.padding, narrow.extent, strict=True)
    centred = all(2 * p - k == 2 * q - m and p >= q for p, k, q, m in reach)
    if not (fits and plain and centred):
        raise StructureError(
            "the two branches do not add up to one layer.",
            where=f"{wide} and {narrow}",
            fix="add branches of equal channels, stride and output size, padded with zeros.",
        )
