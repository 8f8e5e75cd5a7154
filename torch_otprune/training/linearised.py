"""What widths cost, to first order around where they are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch_otprune.structure.graph import CostModel

__all__ = ["Linearised"]


class Linearised:
    """A cost as a function of soft widths, with its slope in each.

    A layer between two pruned groups costs the product of both widths, so the slopes move with
    the widths and are taken anew at every step.

    Args:
        cost: the exact one.

    Example:
        >>> from torch_otprune.structure import Dim, Term
        >>> both = Term("conv", 9, (Dim(0, (("a", 1),)), Dim(0, (("b", 1),))))
        >>> Linearised(CostModel("macs", (both,))).at({"a": 2.0, "b": 0.5})
        (9.0, {'a': 4.5, 'b': 18.0})
    """

    def __init__(self, cost: CostModel) -> None:
        self.terms = [(float(t.scale), [(d.fixed, d.by_group) for d in t.dims]) for t in cost.terms]

    def at(self, widths: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Evaluate the cost and its slopes.

        Args:
            widths: units that each group keeps, which need not be whole.

        Returns:
            the cost, and what one more unit of each group adds.
        """
        total, slopes = 0.0, dict.fromkeys(widths, 0.0)
        for scale, dims in self.terms:
            sizes = [fixed + sum(w * widths[g] for g, w in groups) for fixed, groups in dims]
            total += scale * prod(sizes)
            for place, (_, groups) in enumerate(dims):
                if groups:
                    others = scale * prod(sizes[:place] + sizes[place + 1 :])
                    for group, width in groups:
                        slopes[group] += width * others
        return total, slopes
