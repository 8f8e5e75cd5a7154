"""Ground truth: take the block out and look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Ranking, checked
from torch_otprune.criteria.layers.base import LayerCriterion, LayerNeed, register
from torch_otprune.criteria.layers.runs import nested
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["LossDelta"]


@register
class LossDelta(LayerCriterion):
    """Keep the blocks whose removal changes the real network's output most.

    Each block is taken out in turn and the output compared. Greedy, the block that changes it
    least goes for good and all others are tried again without it, which takes half the square of
    the number of blocks in runs over the data; otherwise each is tried once and costs add up.

    Limits: slow. Sees the network as it is without the block, before any repair, and only on the
    calibration data. The change is of the output; no labels are asked for.

    Source: the yardstick of Song et al. 2024 (SLEB), with the output's change for perplexity.
    """

    kind: Literal["loss_delta"] = "loss_delta"
    needs: ClassVar[frozenset[LayerNeed]] = frozenset({"trial"})
    priced: ClassVar[bool] = True
    greedy: bool = Field(default=True, description="measure again after each removal")

    def rank(self, evidence: ChainEvidence) -> Ranking:
        """Try removals on the network."""
        left = list(range(len(evidence.blocks)))
        gone: list[int] = []
        spent: list[float] = []
        cost = _tried(evidence, gone, left)
        while left:
            block = min(left, key=lambda b: (float(cost[b]), -b))
            before = spent[-1] if spent and not self.greedy else 0.0
            spent.append(before + float(cost[block]))
            gone.append(block)
            left.remove(block)
            cost = _tried(evidence, gone, left) if self.greedy else cost
        return nested(gone, spent)


def _tried(evidence: ChainEvidence, gone: Sequence[int], left: Sequence[int]) -> Tensor:
    """Remove each block that is left beside those that are gone; 0 for the latter."""
    cost = torch.zeros(len(evidence.blocks), dtype=torch.float64, device="cpu")
    for block in left:
        cost[block] = evidence.trial(sorted([*gone, block]))
    return checked(cost, "block", where=f"chain '{evidence.name}'")
