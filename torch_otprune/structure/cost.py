"""What something costs, as an exact function of how many units each group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_otprune.structure.graph import Block

__all__ = ["CostModel", "Dim", "Term"]


@dataclass(frozen=True)
class Dim:
    """One axis of a tensor: `fixed` channels that stay plus `width` for each kept unit."""

    fixed: int
    by_group: tuple[tuple[str, int], ...] = ()

    def at(self, keep: Mapping[str, int]) -> int:
        """Evaluate the axis at kept unit counts."""
        return self.fixed + sum(width * keep[name] for name, width in self.by_group)

    def held(self, units: Mapping[str, int]) -> Dim:
        """Fix some groups for good; the axis depends on the others."""
        kept = sum(width * units[name] for name, width in self.by_group if name in units)
        left = tuple((name, width) for name, width in self.by_group if name not in units)
        return Dim(self.fixed + kept, left)


@dataclass(frozen=True)
class Term:
    """A product of axes: the size of one tensor or the MACs of one layer.

    Its scale is a fraction where the samples of a batch share what is counted. `data` tells a
    product without weights, as attention's scores are.
    """

    owner: str
    scale: int | Fraction
    dims: tuple[Dim, ...]
    data: bool = False

    def at(self, keep: Mapping[str, int]) -> int | Fraction:
        """Evaluate the product at kept unit counts."""
        total = self.scale
        for dim in self.dims:
            total *= dim.at(keep)
        return total


_NOTHING: Mapping[str, int] = MappingProxyType({})
_NO_WIDTHS: Mapping[str, Dim] = MappingProxyType({})


@dataclass(frozen=True)
class CostModel:
    """A cost as an exact function of how many units each group keeps.

    A layer between two pruned groups costs the product of both widths, so the whole is a
    polynomial with rational coefficients, evaluated without rounding.

    Args:
        measure: `params` or `macs`.
        terms: what is summed.
        left_out: ops that cost something which nobody can count.
        open: whether other data of the same shapes may cost another thing.
        beside: of further samples how many, the cost of each, and the share of the cost that
            lies in other modules than the example's; empty where none were looked at.
    """

    measure: str
    terms: tuple[Term, ...]
    left_out: tuple[str, ...] = ()
    open: bool = False
    beside: tuple[int, int, float] | tuple[()] = ()

    def at(self, keep: Mapping[str, int]) -> int:
        """Sum the terms at kept unit counts.

        Args:
            keep: kept units of every group.

        Returns:
            the cost in units of `measure`, rounded down.
        """
        return floor(sum(term.at(keep) for term in self.terms))

    def held(self, units: Mapping[str, int]) -> CostModel:
        """Fix some groups for good.

        Args:
            units: how many each of them keeps.

        Returns:
            the same cost as a function of the others.
        """
        terms = (
            replace(t, dims=tuple(d.held(units) if d.by_group else d for d in t.dims))
            for t in self.terms
        )
        return replace(self, terms=tuple(terms))

    def gated(
        self,
        blocks: Sequence[Block],
        stand_ins: Mapping[str, int] = _NOTHING,
        widths: Mapping[str, Dim] = _NO_WIDTHS,
    ) -> CostModel:
        """Make what blocks cost depend on whether they stay: a width of one or none.

        Args:
            blocks: what may go.
            stand_ins: block to the cost, at the dense width, of what stands in for it once it is
                gone; it grows with the channels of the stream.
            widths: block to these channels, where some may be cut.

        Returns:
            the same cost with a further axis, named after the block, in each of its terms.
        """
        gates = [(block, Dim(0, ((block.name, 1),))) for block in blocks]
        terms = (
            replace(t, dims=(*(gate for b, gate in gates if b.holds(t.owner)), *t.dims))
            for t in self.terms
        )
        instead = (
            Term(
                b.name,
                stand_ins[b.name] // b.channels,
                (Dim(1, ((b.name, -1),)), widths.get(b.name, Dim(b.channels))),
            )
            for b in blocks
            if stand_ins.get(b.name)
        )
        return replace(self, terms=(*terms, *instead))
