"""How an affine layer slides over positions, and what two in a row become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import NoReturn

from torch_otprune.errors import StructureError
from torch_otprune.fold.certificate import Kind

__all__ = ["Geometry", "Step", "follow", "onward", "start"]


@dataclass(frozen=True)
class Geometry:
    """Everything about an affine layer but its numbers. A dense layer has no spatial axis.

    Args:
        into: input channels.
        out: output channels.
        taps: kernel size, per axis.
        dilation: distance between taps, per axis.
        stride: per axis.
        padding: per axis, the same at both ends.
        groups: blocks of channels that do not mix.
        mode: what it pads with; `uneven` where the two ends differ; `zeros` where it does not pad.
        bias: whether it holds a bias.
        shifts: whether it maps zero to something else.
        transposed: whether it slides over its output.
    """

    into: int
    out: int
    taps: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    groups: int = 1
    mode: str = "zeros"
    bias: bool = False
    shifts: bool = False
    transposed: bool = False

    @property
    def axes(self) -> int:
        """Count the spatial axes."""
        return len(self.taps)

    @property
    def extent(self) -> tuple[int, ...]:
        """Measure from the first tap to the last, per axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.taps, self.dilation, strict=True))

    @property
    def weights(self) -> int:
        """Count the weight's elements: the MACs of one position."""
        return self.out * (self.into // self.groups) * prod(self.taps)

    @property
    def pointwise(self) -> bool:
        """Tell whether every output position reads the input at that position alone."""
        plain = all(n == 1 for n in (*self.taps, *self.stride))
        return plain and not any(self.padding) and not self.transposed

    @property
    def diagonal(self) -> bool:
        """Tell whether it only scales and shifts each channel."""
        return self.pointwise and self.groups == self.into == self.out

    def sizes(self, size: Sequence[int]) -> tuple[int, ...]:
        """Compute the output's spatial size.

        Args:
            size: the input's, per axis.

        Returns:
            per axis.
        """
        per_axis = zip(size, self.extent, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in per_axis)


@dataclass(frozen=True)
class Step:
    """What two layers in a row become.

    Args:
        geometry: of the one layer that stands for both.
        border: output positions along each edge where it differs, per axis.
        reason: why, or why not.
    """

    geometry: Geometry
    border: tuple[int, ...]
    reason: str

    @property
    def kind(self) -> Kind:
        """Tell whether the two agree everywhere."""
        return "interior" if any(self.border) else "exact"


def start(geometry: Geometry) -> Step:
    """Begin a row with one layer, which stands for itself."""
    return Step(geometry, (0,) * geometry.axes, "it is one layer")


def onward(step: Step, second: Geometry) -> Step:
    """Compose a row with the layer behind it.

    Args:
        step: what the row has become.
        second: the layer that reads its output.

    Returns:
        what they become; of several inexact compositions the first one's reason is kept.
    """
    new = follow(step.geometry, second, border=step.border)
    return replace(new, reason=step.reason) if any(step.border) else new


def follow(
    first: Geometry,
    second: Geometry,
    *,
    border: tuple[int, ...] = (),
    size: tuple[int, ...] | None = None,
) -> Step:
    """Compose two layers and tell where their composition holds.

    Only padding between them can break it: the second layer reads zeros where the one layer that
    stands for both would evaluate the first beyond its edge. That is zero as well if the first
    has no shift and pads so far that nothing of the input is left to see there.

    Args:
        first: the layer that runs first; its padding, stride and dilation are kept inside.
        second: the layer that reads its output.
        border: positions along each edge of the first's output that are wrong already.
        size: input size that must hold; None for every size.

    Returns:
        the composition; its border is in positions of the second's output.

    Raises:
        StructureError: if no single layer does what the two do.

    Source: composition of strided correlations; K = k1 + (k2 - 1) s1, S = s1 s2, P = p1 + p2 s1,
    where dilated kernels count from first to last tap.
    """
    _check_fit(first, second)
    old = border or (0,) * first.axes
    if second.diagonal:
        bias, shifts = first.bias or second.bias, first.shifts or second.shifts
        scaled = replace(first, bias=bias, shifts=shifts)
        return Step(scaled, old, "a scale and a shift per channel follow any layer exactly")
    mode = _mode(first, second)
    leaks = tuple(_leaks(first, axis, size) for axis in range(first.axes))
    padded = tuple(p > 0 and mode == "zeros" for p in second.padding)
    wrong = tuple(p and (leak or first.shifts) for p, leak in zip(padded, leaks, strict=True))
    per_axis = zip(old, wrong, second.padding, second.stride, strict=True)
    ring = tuple(-(-(w + p) // s) if w or bad else 0 for w, bad, p, s in per_axis)
    return Step(_composed(first, second, mode), ring, _reason(first, padded, wrong))


def _check_fit(first: Geometry, second: Geometry) -> None:
    if first.axes != second.axes:
        _refuse("they slide over different axes", first, second)
    if first.out != second.into:
        _refuse(f"{first.out} channels do not fit {second.into}", first, second)


def _refuse(why: str, first: Geometry, second: Geometry) -> NoReturn:
    raise StructureError(
        f"the two layers do not fold: {why}.",
        where=f"{_words(first)}, then {_words(second)}",
        fix="leave them apart.",
    )


def _words(g: Geometry) -> str:
    if not g.axes:
        return f"{g.into} -> {g.out}"
    return f"{g.into} -> {g.out}, kernel {g.taps}, stride {g.stride}, padding {g.padding} {g.mode}"


def _mode(first: Geometry, second: Geometry) -> str:
    """Choose what the composition pads with."""
    if first.transposed or second.transposed:
        _refuse("a transposed convolution takes up only a scale and a shift", first, second)
    if "uneven" in (first.mode, second.mode):
        _refuse("padding='same' of this kernel differs at the two ends", first, second)
    if not any(second.padding):
        return first.mode
    if first.pointwise:
        return second.mode  # padding copies positions, and each is mapped alike
    if second.mode != "zeros" or first.mode != "zeros":
        _refuse(f"{second.mode} padding after {first.mode} padding is no padding", first, second)
    return "zeros"


def _leaks(g: Geometry, axis: int, size: tuple[int, ...] | None) -> bool:
    """Tell whether a layer evaluated beyond its output's edge would still see the input."""
    if size is None:
        return g.padding[axis] < g.extent[axis] - 1
    # Where the first tap behind the last position is past the input, so is, by the formula of
    # the output's size, the last tap before the first position.
    return g.sizes(size)[axis] * g.stride[axis] - g.padding[axis] < size[axis]


def _composed(first: Geometry, second: Geometry, mode: str) -> Geometry:
    lattice = tuple(_lattice(first, second, axis) for axis in range(first.axes))
    per_axis = list(zip(first.extent, second.extent, first.stride, strict=True))
    extent = [a + (b - 1) * s for a, b, s in per_axis]
    paddings = zip(first.padding, second.padding, first.stride, strict=True)
    return Geometry(
        into=first.into,
        out=second.out,
        taps=tuple((k - 1) // d + 1 for k, d in zip(extent, lattice, strict=True)),
        dilation=lattice,
        stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        padding=tuple(a + b * s for a, b, s in paddings),
        groups=gcd(first.groups, second.groups),
        mode=mode,
        bias=first.bias or second.bias,
        shifts=first.shifts or second.shifts,
    )


def _lattice(first: Geometry, second: Geometry, axis: int) -> int:
    """Find the widest dilation that still meets every tap."""
    own = first.dilation[axis] if first.taps[axis] > 1 else 0
    others = second.dilation[axis] * first.stride[axis] if second.taps[axis] > 1 else 0
    return gcd(own, others) or 1


def _reason(first: Geometry, padded: Sequence[bool], wrong: Sequence[bool]) -> str:
    if not any(padded):
        return "the second layer pads with nothing of its own"
    if not any(wrong):
        return "beyond its edge the first layer is zero, as the second's padding is"
    if first.shifts:
        return "the second layer pads with zeros where the first would give its shift"
    return "the second layer pads with zeros where the first would still see the input"
