"""EASIER's entropy, as published but for the counts."""

from __future__ import annotations

from typing import Literal

from torch_otprune.criteria.layers.base import SiteCriterion, register
from torch_otprune.criteria.layers.sites import entropy_bits, observed
from torch_otprune.statistics.depth import SiteEvidence

__all__ = ["Easier"]


@register
class Easier(SiteCriterion):
    """Keep the activations whose units, all of them, are now on, now off.

    Unlike `entropy`, units that never change count as zero, and an input of exactly zero is on.

    Limits: those of `entropy`; a layer of many dead units and a few busy ones scores low.

    Source: Quétu et al. 2024, "The Simpler The Better: An Entropy-Based Importance Metric To
    Reduce Neural Networks' Depth"; counts are pooled over all samples in place of the mean over
    batches.
    """

    kind: Literal["easier"] = "easier"

    def site(self, evidence: SiteEvidence) -> float:
        """Average the entropy of all units, in bits."""
        return float(entropy_bits(observed(evidence, self.kind).nonnegative).mean())
