"""Distance from the geometric median of the filters."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import ScoreCriterion, register
from torch_otprune.statistics.evidence import Evidence

__all__ = ["FPGM"]


@register
class FPGM(ScoreCriterion):
    """Keep the filters that are far from all others; those near the middle are replaceable.

    Limits: judges weights only; a rescaled filter counts as different.

    Source: He et al. 2019, "Filter pruning via geometric median", equation 5.
    """

    kind: Literal["fpgm"] = "fpgm"

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Sum the Euclidean distances to all other filters."""
        rows = evidence.producers
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
