"""The flagship: move every unit's mass where its consumers notice least."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Criterion, Need, Ranking, register, settle
from torch_otprune.criteria.moments import joint, observed, silent
from torch_otprune.criteria.wide import rank_wide, wide_consumers
from torch_otprune.statistics.evidence import Evidence
from torch_otprune.statistics.moments import WIDE
from torch_otprune.transport import facility_location, improve

__all__ = ["Transport", "ground_cost"]


@register
class Transport(Criterion):
    """Keep the units onto which all others can be moved at the least notice of the consumers.

    A group's units are a measure. Moving unit i onto unit j costs what the consumers would notice,
    with the best scale: `min_s E|W_i (h_i - s h_j)|^2`; moving it onto nothing costs
    `E|W_i h_i|^2`. The k units that minimise the total are semi-relaxed optimal transport onto
    k atoms and the null atom, which is facility location: lazy greedy gives nested sets, within
    1 - 1/e of the best reduction, and swaps improve the set of the chosen size.

    Above `wide` units the moves are priced from some rows of what consumers read, and onto
    `candidates` units each, those that look most alike: a table of all pairs would not fit.

    Limits: each unit moves onto one other; what several units can do together is left to the
    repair. See `obs` for a criterion that counts it.

    Source: ours; semi-relaxed transport as in Peyré & Cuturi 2019, section 10.2.
    """

    kind: Literal["transport"] = "transport"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    swaps: int = Field(default=8, ge=0, description="most rounds of swaps at the chosen size")
    wide: int = Field(
        default=WIDE, ge=1, description="units above which only moves onto candidates are priced"
    )
    candidates: int = Field(
        default=16, ge=1, description="units that each may move onto in a group so wide"
    )

    def rank(self, evidence: Evidence) -> Ranking:
        """Solve the facility location for every size at once."""
        if wide_consumers(evidence):
            return rank_wide(evidence, self.candidates)
        cost, null = ground_cost(evidence)
        found = facility_location(cost, null)
        return Ranking(found.order, found.curve, silent(evidence))

    def refine(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
        """Swap kept against removed units while the transport cost falls."""
        if not self.swaps or wide_consumers(evidence):
            return keep
        cost, null = ground_cost(evidence)
        return improve(cost, null, keep, rounds=self.swaps)[0]


def ground_cost(
    evidence: Evidence,
) -> tuple[Float[Tensor, "units units"], Float[Tensor, " units"]]:
    """Price every move of one unit onto another, summed over consumers with a common scale.

    Args:
        evidence: what is known about the group.

    Returns:
        `cost[i, j]` of moving i onto j and `null[i]` of dropping i, both not below zero, in
        squared units of the network's output (of the consumers' where that was not measured).
    """
    pairs = [joint(consumer) for consumer in observed(evidence, "transport")]
    cross = torch.stack([c for c, _ in pairs]).sum(0)
    own = torch.stack([o for _, o in pairs]).sum(0)
    null = cross.diagonal().clamp_min(0)
    saved = torch.where(own > 0, cross.square() / own.clamp_min(1e-300), torch.zeros_like(own))
    cost = (null[:, None] - saved).clamp_min(0).fill_diagonal_(0.0)
    return settle(cost), settle(null)
