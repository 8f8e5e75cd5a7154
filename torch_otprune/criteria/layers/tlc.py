"""TLC's view of an activation through the batch-norm in front of it."""

from __future__ import annotations

from typing import Literal

from torch_otprune.criteria.layers.base import SiteCriterion, register
from torch_otprune.criteria.layers.normal import share_off
from torch_otprune.criteria.layers.sites import entropy_bits, observed
from torch_otprune.statistics.depth import SiteEvidence

__all__ = ["TLC"]


@register
class TLC(SiteCriterion):
    """Keep the activations whose units a normal input would switch often.

    A batch-norm's shift and scale are the mean and spread of what follows, so the share of time
    that a unit is off needs no data. Where no batch-norm writes the input as it is, the observed
    mean and spread take their place.

    Limits: inputs are no normal variables. The paper's removal also weighs a trial loss, which
    `loss_delta` does.

    Source: Liao et al. 2025, "Till the Layers Collapse: Compressing a Deep Neural Network through
    the Lenses of Batch Normalization Layers".
    """

    kind: Literal["tlc"] = "tlc"

    def site(self, evidence: SiteEvidence) -> float:
        """Average the entropy of all units, in bits."""
        if evidence.norm is not None:
            mean, std = evidence.norm[0], evidence.norm[1].abs()
        else:
            seen = observed(evidence, self.kind)
            mean, std = seen.mean, seen.var.clamp_min(0).sqrt()
        return float(entropy_bits(share_off(mean, std)).mean())
