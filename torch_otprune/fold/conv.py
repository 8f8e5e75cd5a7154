"""Two affine layers in one: composed, added, or run in the cheaper order."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.certificate import Certificate, Folded
from torch_otprune.fold.geometry import Geometry, Step, follow
from torch_otprune.fold.linear import count
from torch_otprune.fold.modules import describe, is_weighted, read, write
from torch_otprune.fold.stencil import Stencil, diagonal, joined, summed
from torch_otprune.plan.model import Cost
from torch_otprune.structure.layers import BatchNorm, Conv

__all__ = ["BiasMap", "commuted", "compose", "constant", "with_shortcut"]

Size = tuple[int, ...] | None
_GLOBAL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class BiasMap(nn.Module):
    """Add a constant that differs from position to position. It fits one input size only.

    Args:
        values: channels x positions.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        """Add the map to a batch of pictures of its size."""
        if x.shape[1:] != self.values.shape:
            raise StructureError(
                f"a bias map of size {tuple(self.values.shape[1:])} met {tuple(x.shape[2:])}.",
                where="BiasMap",
                fix="fold for this input size, or without fixed=True.",
            )
        return x + self.values


def compose(
    first: nn.Module, second: nn.Module, *, size: Size = None, fixed: bool = False
) -> Folded:
    """Fold two consecutive layers into one.

    Dense layers, convolutions, batch-norms in evaluation mode and average pooling; one of the
    two must be a dense layer or a convolution. A transposed convolution takes up a batch-norm.

    Args:
        first: runs first; left as it was.
        second: reads its output, and is its only reader; left as it was.
        size: spatial size of the first's input, to count MACs; of a dense layer's, ().
        fixed: make it exact for inputs of that size alone, if need be with a bias map behind.

    Returns:
        the one layer (two with a bias map); `interior` where only the border differs.

    Raises:
        StructureError: if no single layer does what the two do, or `fixed` comes without a size.

    Limits: a batch-norm of one-dimensional kind behind a dense layer is read as acting on
    (batch, channels); on tokens its channels are another axis.
    """
    like = _weighted(first, second)
    parts = _stencils(first, second)
    a, b = (part.geometry for part in parts)
    _check_size(a, size, fixed=fixed)
    step = follow(a, b)
    if fixed and size is not None and step.kind != "exact":
        return _at_size((first, second), parts, like, size)
    return _folded((first, second), (write(joined(*parts), like),), step, (a, b), size)


def _weighted(first: nn.Module, second: nn.Module) -> nn.Linear | Conv:
    """Choose whose dtype, device and mode the one layer gets."""
    like = first if is_weighted(first) else second
    if not is_weighted(like):
        raise StructureError(
            f"a {type(first).__name__} and a {type(second).__name__} do not fold.",
            where=f"{first!r}, then {second!r}",
            fix="fold one of them into a dense layer or a convolution.",
        )
    if len({(p.dtype, p.device) for m in (first, second) for p in m.parameters()}) > 1:
        raise StructureError(
            "the two layers differ in dtype or device.",
            where=f"{first!r}, then {second!r}",
            fix="bring both to the same dtype and device first.",
        )
    return like


def _stencils(first: nn.Module, second: nn.Module) -> tuple[Stencil, Stencil]:
    axes = max(describe(m).axes for m in (first, second) if is_weighted(m))
    into = describe(second).into if is_weighted(second) else 0
    a = describe(first, channels=into, axes=axes)
    return read(first, a), read(second, describe(second, channels=a.out, axes=axes))


def _check_size(g: Geometry, size: Size, *, fixed: bool) -> None:
    if fixed and size is None:
        raise StructureError(
            "fixed=True came without a size.", where="compose", fix="pass size=(height, width)."
        )
    if size is not None and len(size) != g.axes:
        raise StructureError(
            f"size {size} has {len(size)} axes, the layers slide over {g.axes}.",
            where="compose",
            fix="give the spatial size of one sample, without batch and channels.",
        )


def _at_size(
    old: tuple[nn.Module, nn.Module],
    parts: tuple[Stencil, Stencil],
    like: nn.Linear | Conv,
    size: tuple[int, ...],
) -> Folded:
    """Fold for one input size; where a shift meets zero padding, as a map of biases."""
    a, b = (part.geometry for part in parts)
    step = follow(a, b, size=size)
    whole = joined(*parts)
    if step.kind == "exact":
        return _folded(old, (write(whole, like),), step, (a, b), size, fixed=True)
    unshifted = follow(replace(a, shifts=False), b, size=size)
    if unshifted.kind != "exact":
        return _folded(old, (write(whole, like),), step, (a, b), size)
    step = replace(unshifted, reason="a map of biases is right at the border, for this size alone")
    plain = write(replace(whole, geometry=replace(whole.geometry, bias=False)), like)
    new = (plain, BiasMap(_biases(*parts, size).to(plain.weight)))
    return _folded(old, new, step, (a, b), size, fixed=True)


def _biases(first: Stencil, second: Stencil, size: tuple[int, ...]) -> Tensor:
    """Run the second layer on what the first writes for an input of zeros."""
    g = second.geometry
    sizes = first.geometry.sizes(size)
    shift = first.bias.view(1, -1, *(1,) * g.axes).expand(1, -1, *sizes)
    layer = write(second, nn.Linear(1, 1, dtype=torch.float64))
    values: Tensor = layer(shift)[0].detach()
    return values


def _folded(
    old: tuple[nn.Module, nn.Module],
    new: tuple[nn.Module, ...],
    step: Step,
    geometries: tuple[Geometry, Geometry],
    size: Size,
    *,
    fixed: bool = False,
) -> Folded:
    transposed = geometries[0].transposed  # its output size is not the geometry's to tell
    certificate = Certificate(
        kind=step.kind,
        reason=step.reason,
        border=step.border if step.kind == "interior" else (),
        size=size if fixed else None,
        params=Cost(before=count(*old), after=count(*new)),
        macs=None if size is None or transposed else _macs(old, geometries, step.geometry, size),
    )
    return Folded(new, certificate)


def _macs(
    old: tuple[nn.Module, nn.Module],
    geometries: tuple[Geometry, Geometry],
    whole: Geometry,
    size: tuple[int, ...],
) -> Cost:
    """Count output positions x weight elements; batch-norms and pools are free, as in plans."""
    middle = geometries[0].sizes(size)
    grids = (middle, geometries[1].sizes(middle))
    costs = zip(old, geometries, grids, strict=True)
    before = sum(g.weights * prod(grid) for module, g, grid in costs if is_weighted(module))
    return Cost(before=before, after=whole.weights * prod(whole.sizes(size)))


def with_shortcut(branch: Conv, shortcut: Conv | None = None) -> Folded:
    """Fold a residual addition into its branch: one layer computes branch(x) + shortcut(x).

    The shortcut's taps land where the branch's padding puts the same input position, which is
    tap P and not the kernel's middle.

    Args:
        branch: a convolution that keeps the size, or strides like the shortcut; left as it was.
        shortcut: a convolution; None for x itself.

    Returns:
        one convolution, exact everywhere.

    Raises:
        StructureError: if the two outputs do not lie on one another.
    """
    layers = [branch] if shortcut is None else [branch, shortcut]
    parts = [read(layer, describe(layer)) for layer in layers]
    if shortcut is None:
        parts.append(_identity(parts[0]))
    new = write(summed(*parts), branch)
    certificate = Certificate(
        kind="exact",
        reason="both read the same input, and zeros beyond its edge",
        params=Cost(before=count(*layers), after=count(new)),
    )
    return Folded((new,), certificate)


def _identity(branch: Stencil) -> Stencil:
    ones = torch.ones(branch.geometry.into, dtype=torch.float64)
    return diagonal(ones, torch.zeros_like(ones), branch.geometry.axes)


def commuted(layer: Conv, pool: nn.Module) -> Folded:
    """Pool first, then mix channels: the same numbers, at one position instead of all.

    Args:
        layer: a convolution of one tap without stride and padding; left as it was.
        pool: global average pooling of its output; left as it was.

    Returns:
        copies of both, the pool first.

    Raises:
        StructureError: if the layer sees more than one position, or the pool leaves several.
    """
    whole = isinstance(pool, _GLOBAL) and pool.output_size in (1, (1,), (1, 1), (1, 1, 1))
    if not whole or not isinstance(layer, Conv) or not describe(layer).pointwise:
        raise StructureError(
            f"a {type(layer).__name__} and a {type(pool).__name__} do not commute.",
            where=f"{layer!r}, then {pool!r}",
            fix="only global average pooling moves in front of a convolution of one tap.",
        )
    params = Cost(before=count(layer), after=count(layer))
    reason = "a mean over positions and a sum over channels may be taken in either order"
    certificate = Certificate(kind="exact", reason=reason, params=params)
    return Folded((copy.deepcopy(pool), copy.deepcopy(layer)), certificate)


def constant(layer: nn.Module) -> Tensor | None:
    """Tell what a layer writes if it writes the same for every input.

    Such a branch is deleted, and its constant `absorbed` by the layer behind where that is exact.

    Args:
        layer: dense layer, convolution or batch-norm.

    Returns:
        one number per channel, in float64; None where the output depends on the input.
    """
    if not (is_weighted(layer) or isinstance(layer, BatchNorm)):
        return None
    stencil = read(layer, describe(layer))
    return None if stencil.weight.any() else stencil.bias
