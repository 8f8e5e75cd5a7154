"""The angle by which a window of blocks turns the end of each sample."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, settle
from torch_otprune.criteria.layers.base import LayerCriterion, register
from torch_otprune.criteria.layers.block_influence import directed
from torch_otprune.criteria.layers.runs import nested
from torch_otprune.criteria.layers.stream import stream
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["Angular"]


@register
class Angular(LayerCriterion):
    """Remove a contiguous window of blocks, the one that turns the last row of a sample least.

    A window costs the mean angle between the stream in front of it and behind it, as a share of a
    half turn. The published rule looks for the best window of each size; these need not contain
    one another. Here each window holds the one before and one neighbour more: of all such
    sequences, the one whose costs add up to least, found by dynamic programming.

    Limits: never two windows apart, and blind to the length of a row. The best window of one size
    may be better than the nested one. The window may hold the last block, which the paper's
    simplest variant keeps.

    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers"; the
    nesting is ours.
    """

    kind: Literal["angular"] = "angular"

    def rank(self, evidence: ChainEvidence) -> Ranking:
        """Grow the window from one block to all."""
        cost = settle(self._windows(evidence))
        blocks = len(evidence.blocks)
        # total[i]: the least sum of costs on the way to the window of the current size from i.
        total, grown = cost.diagonal(), []
        for size in range(2, blocks + 1):
            # True: the window from i grew leftwards, out of the one from i + 1.
            grown.append(total[1:] < total[:-1])
            total = torch.minimum(total[1:], total[:-1]) + cost.diagonal(size - 1)
        first, last = 0, blocks - 1
        gone, spent = [], []
        for left in reversed(grown):
            spent.append(float(cost[first, last]))
            gone.append(first if left[first] else last)
            first, last = (first + 1, last) if left[first] else (first, last - 1)
        spent.append(float(cost[first, last]))
        return nested([first, *gone[::-1]], spent[::-1])

    def _windows(self, evidence: ChainEvidence) -> Float[Tensor, "blocks blocks"]:
        """Measure the angle across blocks i to j, at [i, j]."""
        if not bool(evidence.last.any()):
            raise CalibrationError(
                "no row is the last one of its sample.",
                where=f"chain '{evidence.name}', criterion angular",
                fix="use criterion 'block_influence', which looks at all rows.",
            )
        ends = stream(evidence)[:, evidence.last]
        turned = torch.stack([_angle(x, ends) for x in ends])
        return turned[:-1, 1:]


def _angle(
    x: Float[Tensor, "rows channels"], others: Float[Tensor, "points rows channels"]
) -> Float[Tensor, " points"]:
    """Average the angle between the rows of x and of each other point, in half turns."""
    x, others = directed(x[None]), directed(others)
    apart, together = (x - others).norm(dim=2), (x + others).norm(dim=2)
    # Unlike the arc of the cosine, exact where the angle is small.
    angle = 2 * torch.atan2(apart, together) / torch.pi
    return angle.mean(1)
