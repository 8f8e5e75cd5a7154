"""What an activation does that no affine map per channel could."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.layers.base import SiteCriterion, register
from torch_otprune.criteria.layers.normal import rectified, relu6
from torch_otprune.criteria.layers.sites import observed
from torch_otprune.statistics.depth import SiteEvidence

__all__ = ["Stein"]

FORMULAS = {"relu": rectified, "relu6": relu6}


@register
class Stein(SiteCriterion):
    """Keep the activations that no affine map per channel could replace.

    The best slope and intercept of each channel leave a part of its output's variance unexplained.
    Weighted by how much the next layers read of each channel, the score is that part over all
    variance, from 0 for channels that are linear, constant or dead, to 1.

    With `data_free`, or without data, a batch-norm whose output is the input of a ReLU or ReLU6
    gives the same numbers in closed form, for normal inputs.

    Limits: channels are taken one by one; what the network's output feels beyond the next layers
    is not seen. In closed form, inputs are taken to be normal.

    Source: ours; the best slope for a normal input by Stein's lemma (Stein 1981).
    """

    kind: Literal["stein"] = "stein"
    data_free: bool = Field(
        default=False, description="prefer the batch-norm's moments to the observed ones"
    )

    def site(self, evidence: SiteEvidence) -> float:
        """Take the unexplained share of what the next layers read."""
        left, power = self._moments(evidence)
        weight = torch.ones_like(power) if evidence.reads is None else evidence.reads
        total = float((weight * power).sum())
        return float((weight * left).sum()) / total if total != 0 else 0.0

    def _moments(self, evidence: SiteEvidence) -> tuple[Tensor, Tensor]:
        known = evidence.norm is not None and evidence.function in FORMULAS
        if known and (self.data_free or not evidence.count):
            return _closed(evidence)
        return _seen(observed(evidence, self.kind))


def _seen(
    evidence: SiteEvidence,
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return unexplained and total variance of the output, from pooled sums."""
    varies = evidence.var > 0
    slope = torch.where(varies, evidence.cov / torch.where(varies, evidence.var, 1.0), 0.0)
    power = torch.where(varies, evidence.out_var.clamp_min(0), 0.0)
    left = (power - slope * evidence.cov).clamp_min(0)
    return torch.minimum(left, power), power


def _closed(
    evidence: SiteEvidence,
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return the same for normal inputs with the batch-norm's moments."""
    assert evidence.norm is not None
    mean, std = evidence.norm[0].double(), evidence.norm[1].double().abs()
    varies = std > 0
    slope, first, second = FORMULAS[evidence.function](mean, torch.where(varies, std, 1.0))
    power = torch.where(varies, (second - first.square()).clamp_min(0), 0.0)
    left = (power - slope.square() * std.square()).clamp_min(0)
    return torch.minimum(left, power), power
