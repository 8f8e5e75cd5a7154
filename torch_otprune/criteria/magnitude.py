"""The size of a unit's weights."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import ScoreCriterion, register
from torch_otprune.statistics.evidence import Evidence

__all__ = ["Magnitude"]


@register
class Magnitude(ScoreCriterion):
    """Keep the units whose producing weights are large.

    Limits: blind to the data, to batch-norm scales and to what the consumers do with a unit.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets" (p = 1); p = 2 is common.
    """

    kind: Literal["magnitude"] = "magnitude"
    p: float = Field(default=2.0, ge=1.0, description="order of the norm")

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Take the norm of each unit's row of weights."""
        norms: Tensor = torch.linalg.vector_norm(evidence.producers, ord=self.p, dim=1)
        return norms
