"""Which neighbours of a row to fold together, so that the row costs least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from torch import nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.certificate import Certificate
from torch_otprune.fold.chains import Layer
from torch_otprune.fold.geometry import Geometry, Step, onward, start
from torch_otprune.fold.linear import bare, norm_line
from torch_otprune.fold.modules import describe, identical, is_weighted, read, write
from torch_otprune.fold.stencil import Stencil, diagonal, joined
from torch_otprune.plan.model import Cost
from torch_otprune.structure.layers import BatchNorm

__all__ = [
    "Gate",
    "Piece",
    "cheapest",
    "composed",
    "growing",
    "prefixes",
    "replacements",
    "standing_apart",
]

Gate = Literal["macs", "params", "none"]


@dataclass(frozen=True)
class Piece:
    """Neighbouring affine layers, and the one layer that would stand for them.

    Args:
        layers: one or more, in order of execution.
        step: what they become.
        params: before and after.
        macs: before and after, per sample.
    """

    layers: tuple[Layer, ...]
    step: Step
    params: Cost
    macs: Cost

    @property
    def certificate(self) -> Certificate:
        """State what folding them promises."""
        step = self.step
        border = step.border if step.kind == "interior" else ()
        return Certificate(
            kind=step.kind, reason=step.reason, border=border, params=self.params, macs=self.macs
        )

    def cost(self, gate: Gate) -> int:
        """Read what the gate looks at."""
        return {"macs": self.macs.after, "params": self.params.after, "none": 0}[gate]


def growing(row: Sequence[Layer]) -> Iterator[Piece]:
    """Price the first layer, the first two, and so on, as long as they compose.

    Args:
        row: neighbouring affine layers; the first may be a norm.

    Yields:
        pieces; those of several layers only where one of them is a dense layer or a convolution.
    """
    step = start(_geometry(row[0]))
    yield _priced(row[:1], step)
    for end in range(2, len(row) + 1):
        try:
            step = onward(step, _geometry(row[end - 1]))
        except StructureError:
            return
        if _is_weighted(row[:end]):
            yield _priced(row[:end], step)


def _is_weighted(layers: Sequence[Layer]) -> bool:
    return any(is_weighted(layer.module) for layer in layers)


def _geometry(layer: Layer) -> Geometry:
    assert layer.geometry is not None, f"{layer.path} is not affine"
    return layer.geometry


def _priced(layers: Sequence[Layer], step: Step) -> Piece:
    g, params, macs = step.geometry, sum(x.params for x in layers), sum(x.macs for x in layers)
    weights, whole = params, macs  # a layer on its own stays as it is
    if len(layers) > 1:
        positions = (layers[0] if g.transposed else layers[-1]).positions
        weights, whole = g.weights + g.out * g.bias, g.weights * positions
    costs = Cost(before=params, after=weights), Cost(before=macs, after=whole)
    return Piece(tuple(layers), step, *costs)


def cheapest(row: Sequence[Layer], gate: Gate, *, interior: bool) -> tuple[Piece, ...]:
    """Cut a row into pieces, so that all of them together cost least and, at that, are fewest.

    Args:
        row: neighbouring affine layers.
        gate: what costs.
        interior: whether a piece may be wrong near the border.

    Returns:
        the pieces, in order; one layer on its own is a piece.
    """
    return prefixes(row, gate, interior=interior)[-1]


def prefixes(row: Sequence[Layer], gate: Gate, *, interior: bool) -> list[tuple[Piece, ...]]:
    """Cut nothing, the first layer, the first two, and so on, into the cheapest pieces.

    Args:
        row: neighbouring affine layers.
        gate: what costs.
        interior: whether a piece may be wrong near the border.

    Returns:
        the pieces of every beginning of the row, the empty one first.
    """
    best: list[tuple[int, tuple[Piece, ...]]] = [(0, ())]
    options: list[list[tuple[int, tuple[Piece, ...]]]] = [[] for _ in row]
    for begin in range(len(row)):
        cost, pieces = best[begin]
        for found in growing(row[begin:]):
            if interior or found.step.kind == "exact":
                end = begin + len(found.layers) - 1
                options[end].append((cost + found.cost(gate), (*pieces, found)))
        best.append(min(options[begin], key=_order))
    return [pieces for _, pieces in best]


def _order(option: tuple[int, tuple[Piece, ...]]) -> tuple[int, int, int]:
    """Prefer the cheapest, then the fewest, then batch-norms in the layer that they follow."""
    cost, pieces = option
    return cost, len(pieces), sum(isinstance(p.layers[0].module, BatchNorm) for p in pieces)


def composed(layers: Sequence[Layer]) -> Piece:
    """Price layers as the one layer that would stand for them.

    Args:
        layers: neighbouring affine layers; the first may be a norm.

    Returns:
        the piece.

    Raises:
        StructureError: if no single layer does what they do.
    """
    first, *others = map(_geometry, layers)
    return _priced(layers, reduce(onward, others, start(first)))


def standing_apart(
    first: Piece, second: Piece, gate: Gate, *, interior: bool
) -> tuple[Certificate | None, str]:
    """Say why two neighbouring pieces were not folded into one.

    Args:
        first: the one that runs first.
        second: the other.
        gate: what costs.
        interior: whether a piece may be wrong near the border.

    Returns:
        what folding them would promise, None where no layer could do it, and the reason.
    """
    both = (*first.layers, *second.layers)
    try:
        step = reduce(onward, map(_geometry, second.layers), first.step)
    except StructureError as error:
        return None, error.problem
    if not _is_weighted(both):
        return None, "there is neither a dense layer nor a convolution to fold into"
    whole = _priced(both, step)
    if step.kind != "exact" and not interior:
        return whole.certificate, f"only the interior would be right: {step.reason}"
    now = first.cost(gate) + second.cost(gate)
    return whole.certificate, f"it would raise {gate} from {now:,} to {whole.cost(gate):,}"


def replacements(layers: Sequence[Layer]) -> dict[str, nn.Module]:
    """Build what takes the place of a piece's layers.

    The folded layer takes the place of the first; a norm in front stays, without scale and shift.

    Args:
        layers: two or more, in order of execution.

    Returns:
        path to new module.
    """
    slot = 1 if layers[0].kind == "norm" else 0
    stencil = reduce(joined, map(_stencil, layers))
    weighted = [layer.module for layer in layers if is_weighted(layer.module)]
    alike = [m for m in weighted if identical(describe(m), stencil.geometry)]
    new: dict[str, nn.Module] = {layers[slot].path: write(stencil, (alike or weighted)[0])}
    if slot:
        new[layers[0].path] = bare(layers[0].module)
    rest = [path for x in layers[slot + 1 :] for path in (*x.passed, x.path)]
    training = layers[slot].module.training
    return new | {path: nn.Identity().train(training) for path in rest}


def _stencil(layer: Layer) -> Stencil:
    assert layer.geometry is not None
    if layer.kind == "norm":
        return diagonal(*norm_line(layer.module), 0)
    return read(layer.module, layer.geometry)
