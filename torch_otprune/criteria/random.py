"""Chance, the yardstick."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import ScoreCriterion, register
from torch_otprune.statistics.evidence import Evidence

__all__ = ["Random"]


@register
class Random(ScoreCriterion):
    """Keep units at random, by the policy's seed and the group's name.

    Source: the baseline that every criterion has to beat.
    """

    kind: Literal["random"] = "random"

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Draw one uniform number per unit."""
        seed = evidence.seed ^ zlib.crc32(evidence.name.encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(evidence.units, generator=generator, dtype=torch.float64, device="cpu")
