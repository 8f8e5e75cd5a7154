"""Chance, the yardstick for depth."""

from __future__ import annotations

import zlib
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.layers.base import LayerNeed, ScoreLayerCriterion, register
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["Random"]


@register
class Random(ScoreLayerCriterion):
    """Keep blocks at random, by the policy's seed and the block's name.

    Source: the baseline that every criterion has to beat.
    """

    kind: Literal["random"] = "random"
    needs: ClassVar[frozenset[LayerNeed]] = frozenset()

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Draw one uniform number per block."""
        draws = []
        for block in evidence.blocks:
            seed = evidence.seed ^ zlib.crc32(block.encode())
            generator = torch.Generator().manual_seed(seed)
            draws.append(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
        return torch.stack(draws)
