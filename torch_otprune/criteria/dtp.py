"""Differentiable transportation pruning: masks that training finds."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, ScoreCriterion, register
from torch_otprune.criteria.masks import UNTRAINED, MaskSetting
from torch_otprune.statistics.evidence import Evidence

__all__ = ["DTP"]


@register
class DTP(MaskSetting, ScoreCriterion):
    """Keep the units that training keeps, under a budget that every step meets.

    Every unit has a score, and the masks are the entropic transport plan from the scores to keep
    and drop: a logistic of score minus one threshold that the whole budget shares. Your loss
    trains scores and weights together, through `attached.step`.

    Limits: needs training, and looks at nothing else: without it, the size of the weights
    decides. Heads and channels only: no whole stream, no experts.

    Source: Li et al. 2023, "Differentiable transportation pruning"; no code of it is public. Ours:
    the exact root in place of Sinkhorn steps, starting scores, softness and the sinking budget.
    """

    kind: Literal["dtp"] = "dtp"
    learns: ClassVar[bool] = True

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Return the size of the weights with batch-norms folded in: where scores start."""
        if not evidence.filters:
            return evidence.producers.abs().sum(1)
        return torch.stack([f.weight.abs().sum((1, 2, 3)) for f in evidence.filters]).sum(0)

    def rank(self, evidence: Evidence) -> Ranking:
        """Order units as training left them."""
        learnt = evidence.learnt
        if learnt is None:
            ranking = super().rank(evidence)
            return Ranking(ranking.order, ranking.curve, UNTRAINED)
        order = torch.argsort(learnt.logits, descending=True, stable=True)
        order = order[torch.argsort(learnt.keep[order].double(), descending=True, stable=True)]
        soft = torch.sigmoid(learnt.logits)[order]
        left = soft.flip(0).cumsum(0).flip(0)
        curve = torch.cat([left, left.new_zeros(1)]) / soft.sum().clamp_min(1e-300)
        return Ranking(order, curve, learnt.note, size=int(learnt.keep.sum()))
