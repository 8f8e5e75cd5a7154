"""The scale that batch-norm gives a unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, ScoreCriterion, register
from torch_otprune.statistics.evidence import Evidence

__all__ = ["BNScale"]


@register
class BNScale(ScoreCriterion):
    """Keep the units whose batch-norm scale is large; without a batch-norm, whose weights are.

    Limits: means little unless the network was trained with a penalty on the scales.

    Source: Liu et al. 2017, "Learning efficient convolutional networks through network slimming".
    """

    kind: Literal["bn_scale"] = "bn_scale"

    def rank(self, evidence: Evidence) -> Ranking:
        """Sort by score, and say where there is no scale to go by."""
        found = super().rank(evidence)
        bare = evidence.scales is None
        note = "no batch-norm carries these units; ranked by weight norm" if bare else ""
        return replace(found, note="; ".join(filter(None, (note, found.note))))

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Average the absolute scales over the norms that carry the unit."""
        if evidence.scales is None:
            norms: Tensor = torch.linalg.vector_norm(evidence.producers, dim=1)
            return norms
        return evidence.scales.abs().mean(dim=1)
